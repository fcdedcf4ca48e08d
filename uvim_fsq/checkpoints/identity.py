"""What a trained run is: which settings it keeps on resume, which may change when asked, and which are free.

Settings are compared key by key after both sides were read with today's defaults, so a key that an older version did
not know counts as its default. Knows nothing of torch or of how checkpoints are stored.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from uvim_fsq.config.schema import LEVEL_PRESETS, Run, TaskSection
from uvim_fsq.data.roots import find_data_root
from uvim_fsq.errors import UserError
from uvim_fsq.tasks.configuration import changeable

#: How fast or on what machine predictions are made, not which.
SPEED = frozenset(
    {
        "data.workers",
        "data.cache",
        "data.max_bad_samples",  # decides when to give up, not what is learned
        "data.max_pixels",
        "eval.batch_size",
        "eval.workers",
        "eval.compile",
    }
)
#: What a resumed run may change without being asked: no sample, gradient, figure or choice of checkpoint depends on it.
FREE = SPEED | {
    "oracle",  # a run trains on with the copy that it carries
    "train.out",  # a checkpoint may be continued elsewhere
    "train.resume",
    "train.resume_changes",
    "train.log_every",
    "train.save_every",
    "train.keep",
    "train.wandb",
    "train.compile",
    "train.accumulate",  # the same batch in other pieces, to fit another device
}

Differences = Mapping[str, tuple[Any, Any]]


def differences(trained: Run, asked: Run) -> dict[str, tuple[Any, Any]]:
    """Key -> (trained value, asked value) of every setting in which two resolved configurations differ."""
    before, after = flatten(trained), flatten(asked)
    keys = dict.fromkeys((*before, *after))
    return {key: (before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)}


def flatten(value: Any, key: str = "") -> dict[str, Any]:
    """A configuration as dotted key -> plain value; presets of levels are written out."""
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
    """Whether a key defines the model or the meaning of its labels, so that no trained run can follow a change."""
    section, _, rest = key.partition(".")
    if section == "task":
        return rest.partition(".")[0] not in changeable(task)
    return section in ("stage", "model") or key == "data.image_size"


def check_resume(asked: Run, trained: Run) -> None:
    """Refuses to go on with other settings than those of the checkpoint.

    Raises UserError naming every key with both values: for model, labels and optimizer always, for what else changes
    the result unless `train.resume_changes` is set.
    """
    changed = {key: values for key, values in differences(trained, asked).items() if key not in FREE}
    if "data.root" in changed and _same_folder(*changed["data.root"]):
        del changed["data.root"]
    # The initial weights are gone; but what the run's configuration says of them shall not change by accident.
    initial = "model.encoder.weights"
    fixed = {
        key: values
        for key, values in changed.items()
        if (is_fixed(key, trained.task) and key != initial) or key == "optim.name"
    }
    if fixed:
        raise UserError(
            f"{describe(fixed)}: a run keeps its model, labels and optimizer; "
            "leave these settings as they were, or start another run with another train.out"
        )
    if changed and not asked.train.resume_changes:
        raise UserError(
            f"these settings are not the checkpoint's: {describe(changed, 'was')}; "
            "leave them as they were, or go on with the new ones by train.resume_changes=true"
        )


def check_overrides(asked: Run, trained: Run) -> dict[str, list[Any]]:
    """Key -> [trained value, asked value] of what `key=value` changed of a trained run, for its results to name.

    Raises UserError, naming the keys with both values, for what defines the model or its labels.
    """
    changed = differences(trained, asked)
    fixed = {key: values for key, values in changed.items() if is_fixed(key, trained.task)}
    if fixed:
        raise UserError(f"{describe(fixed)}: a trained model cannot follow; leave these settings out")
    return {key: list(values) for key, values in changed.items()}


def describe(changed: Mapping[str, Any], verb: str = "trained with") -> str:
    """Changed settings as text, e.g. "eval.temperature=0.7 (trained with 0.0)". Values are pairs (trained, asked)."""
    return ", ".join(f"{key}={_text(after)} ({verb} {_text(before)})" for key, (before, after) in changed.items())


def _text(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value, default=str).replace('""', "''")


def _same_folder(before: str, after: str) -> bool:
    try:
        return find_data_root(before).samefile(find_data_root(after))
    except UserError:
        return False
