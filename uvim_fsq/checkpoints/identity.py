"""Which settings of a trained run are fixed, which may change on request, and which may change freely.

Settings are compared key by key after both configurations were read with the current defaults. A key that an older
version did not have therefore counts as its default. The module does not import torch.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from uvim_fsq.config.schema import LEVEL_PRESETS, SAMPLING_KEYS, OracleRun, Run, TaskSection
from uvim_fsq.data.roots import find_data_root
from uvim_fsq.errors import UserError
from uvim_fsq.tasks.configuration import changeable

#: Settings that affect the speed of predictions or the hardware they need, but not, by themselves, the predictions.
SPEED = frozenset(
    {
        "data.workers",
        "data.cache",
        "data.cache_dir",
        "data.max_bad_samples",  # decides when training gives up, not what it learns
        "data.max_pixels",
        "eval.batch_size",
        "eval.workers",
        "eval.compile",
        "eval.tuned",  # the settings that it applies are listed themselves
    }
)
#: Settings that may change freely on resume, because no sample, gradient, metric or checkpoint choice depends on them.
FREE = SPEED | {
    "oracle",  # a resumed run uses its own copy of the oracle
    "train.out",  # a checkpoint may be continued in a different run directory
    "train.resume",
    "train.resume_changes",
    "train.log_every",
    "train.save_every",
    "train.keep",
    "train.trackers",
    "train.wandb",
    "train.compile",
    "train.accumulate",  # splits the same batch differently, to fit another device
    "task.colors",  # of pictures
}

#: Settings of predicted tokens, of which an oracle has none.
PREDICTED = frozenset(
    f"eval.{key}" for key in ("codes", "code_scale", "context_weight", "samples", "int8_cross_kv", *SAMPLING_KEYS)
)

Differences = Mapping[str, tuple[Any, Any]]


def differences(trained: Run, asked: Run) -> dict[str, tuple[Any, Any]]:
    """Key -> (trained value, requested value) for every setting in which two resolved configurations differ."""
    before, after = flatten(trained), flatten(asked)
    keys = dict.fromkeys((*before, *after))
    return {key: (before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)}


def flatten(value: Any, key: str = "") -> dict[str, Any]:
    """Flattens a configuration into dotted key -> plain value. Level presets are expanded."""
    inner = f"{key}." if key else ""
    if isinstance(value, TaskSection):
        return {f"{inner}name": value.name, **flatten(value.options, key)}
    if dataclasses.is_dataclass(value):
        fields = [field.name for field in dataclasses.fields(value) if not field.metadata.get("internal")]
        return {k: v for name in fields for k, v in flatten(getattr(value, name), inner + name).items()}
    if key == "model.quantizer.levels":
        value = LEVEL_PRESETS.get(value, value)
    return {key: list(value) if isinstance(value, tuple) else value}


def is_fixed(key: str, task: TaskSection) -> bool:
    """Whether a key defines the model or the meaning of its labels, so that it cannot change after training."""
    section, _, rest = key.partition(".")
    if section == "task":
        return rest.partition(".")[0] not in changeable(task)
    return section in ("stage", "model") or key == "data.image_size"


def check_resume(asked: Run, trained: Run) -> None:
    """Checks that training may resume from a checkpoint with the requested settings.

    Raises UserError, naming every key with both values, if settings of the model, the labels or the optimizer differ.
    Other settings that change the result may differ only if `train.resume_changes` is set.
    """
    changed = {key: values for key, values in differences(trained, asked).items() if key not in FREE}
    if "data.root" in changed and same_folder(*changed["data.root"]):
        del changed["data.root"]
    # The initial weights no longer matter, but their entry in the configuration should not change by accident.
    initial = "model.encoder.weights"
    fixed = {
        key: values
        for key, values in changed.items()
        if (is_fixed(key, trained.task) and key != initial) or key in ("optim.name", "optim.encoder_layer_decay")
    }
    if fixed:
        raise UserError(
            f"{describe_overrides(fixed)}: a run keeps its model, labels and optimizer; "
            "leave these settings as they were, or start a new run with another train.out"
        )
    if changed and not asked.train.resume_changes:
        raise UserError(
            f"these settings differ from the checkpoint's: {describe_overrides(changed, 'was')}; "
            "leave them as they were, or continue with the new ones by setting train.resume_changes=true"
        )


def check_overrides(asked: Run, trained: Run) -> dict[str, list[Any]]:
    """Key -> [trained value, requested value] for the settings that overrides changed; results list them.

    Raises UserError, naming the keys with both values, for settings that define the model or its labels, and for those
    of predicted tokens if the model is an oracle.
    """
    changed = differences(trained, asked)
    if isinstance(trained, OracleRun) and (unused := [key for key in changed if key in PREDICTED]):
        raise UserError(f"{', '.join(unused)}: an oracle predicts no tokens; leave it out, or give the run of an LM")
    fixed = {key: values for key, values in changed.items() if is_fixed(key, trained.task)}
    if fixed:
        raise UserError(f"{describe_overrides(fixed)}: a trained model cannot change these; leave these settings out")
    return {key: list(values) for key, values in changed.items()}


def describe_overrides(changed: Mapping[str, Any], verb: str = "trained with") -> str:
    """Formats changed settings, given as (trained, requested) pairs, e.g. "eval.temperature=0.7 (trained with 0.0)"."""
    return ", ".join(f"{key}={_text(after)} ({verb} {_text(before)})" for key, (before, after) in changed.items())


def _text(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value, default=str).replace('""', "''")


def same_folder(before: str, after: str) -> bool:
    """Whether two values of `data.root` mean the same folder; False if either does not exist."""
    try:
        return find_data_root(before).samefile(find_data_root(after))
    except UserError:
        return False
