"""The decoding settings that `uvim-fsq tune` chose for a checkpoint: its file decoding.json, and when they apply.

A checkpoint's predictions use them unless `eval.tuned=false`, except for keys that are given. They are never used for
the images that they were chosen on. The module does not import torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from uvim_fsq.checkpoints.ancestors import seen
from uvim_fsq.checkpoints.identity import same_folder
from uvim_fsq.checkpoints.layout import DECODING as DECODING
from uvim_fsq.checkpoints.run_directory import (
    find_oracle,
    parse_config,
    read_config,
    read_oracle_config,
    read_overridden,
    weights_hash,
)
from uvim_fsq.config.parse import convert
from uvim_fsq.config.schema import SAMPLING_KEYS, Ancestor, EvalConfig, LMRun, Run
from uvim_fsq.data.splits import share_images
from uvim_fsq.errors import UserError
from uvim_fsq.files import read_json

#: The keys of `eval` that are chosen together.
TUNED_KEYS = ("codes", "code_scale", "context_weight", "samples", *SAMPLING_KEYS)
#: `LoadedRun.decoding_from` of settings that were not tuned.
FROM_RUN = "the run"
#: How to get images that a run was neither trained on nor is reported for.
REMEDY = (
    "train both stages with data.train_split=train_minus_holdout data.selection_split=holdout, name another split with "
    "--split, or give other labeled images with data.root=FOLDER --unseen"
)


@dataclass(frozen=True)
class Tuned:
    """The content of decoding.json that matters for predictions.

    Attributes:
        settings: key of `TUNED_KEYS` -> value.
        split: the split that they were chosen on.
        other_root: its `data.root`, if that is other data than the run's; else empty.
        images: how many of its images.
        metric: the task's metric that they were chosen by.
    """

    settings: dict[str, Any]
    split: str
    other_root: str
    images: int
    metric: str

    def describe(self, used: EvalConfig) -> str:
        """Where the settings `used` come from, as text for results."""
        given = [key for key, value in self.settings.items() if getattr(used, key) != value]
        own = f", except for {', '.join(given)}" if given else ""
        other = f" of {self.other_root}" if self.other_root else ""
        return f"tuned on {self.split}{other}, {self.images} images{own}"

    def overrides(self) -> list[str]:
        """The settings as `key=value`."""
        return [f"eval.{key}={'null' if value is None else value}" for key, value in self.settings.items()]


def read_tuned(checkpoint: Path) -> Tuned | None:
    """The settings that were tuned for a checkpoint, or None. Raises UserError for a damaged or foreign file."""
    file, remedy = checkpoint / DECODING, "run `uvim-fsq tune` again, or delete the file"
    try:
        record = read_json(file, remedy)
    except FileNotFoundError:
        return None
    hints = get_type_hints(Tuned) | {"settings": dict, "checkpoint_sha256": str}
    settings = record.get("settings")
    if not all(type(record.get(name)) is kind for name, kind in hints.items()) or set(settings or ()) != {*TUNED_KEYS}:
        raise UserError(f"{file} is damaged (keys are missing or of the wrong type); {remedy}")
    if record["checkpoint_sha256"] != weights_hash(checkpoint):
        raise UserError(f"{file} was tuned for another checkpoint (its SHA-256 is that of other weights); {remedy}")
    types = get_type_hints(EvalConfig)
    try:
        settings = {key: convert(types[key], record["settings"][key], key) for key in TUNED_KEYS}
    except UserError as error:
        raise UserError(f"{file} is damaged ({error}); {remedy}") from error
    return Tuned(settings, **{name: record[name] for name in ("split", "other_root", "images", "metric")})


def read_for_prediction(
    checkpoint: Path, overrides: Sequence[str] = (), *, tuned: bool = True
) -> tuple[Run, dict[str, list[Any]], Tuned | None]:
    """Like `read_overridden`, with the settings that were tuned for the checkpoint.

    Args:
        checkpoint: the checkpoint directory.
        overrides: `key=value` strings.
        tuned: False never applies the tuned settings, like `eval.tuned=false`.

    Returns the configuration; key -> [trained value, current value] of the changed settings, the tuned ones among them;
    and what was tuned, or None if nothing was or it does not apply.

    Raises UserError for a damaged or foreign decoding.json, if it is to be used, and like `read_overridden`.
    """
    found = None
    if tuned and (checkpoint / DECODING).exists():
        run = parse_config(checkpoint, overrides)[0]
        found = read_tuned(checkpoint) if isinstance(run, LMRun) and run.eval.tuned else None
    if found is None:
        run, changed = read_overridden(checkpoint, overrides)
    else:
        try:
            run, changed = read_overridden(checkpoint, [*found.overrides(), *overrides])
        except UserError as error:
            read_overridden(checkpoint, overrides)  # raises if the tuned settings are not at fault
            raise UserError(
                f"{error} (the rest is from {checkpoint / DECODING}, which eval.tuned=false ignores)"
            ) from (error)
    return run, {key: values for key, values in changed.items() if key != "eval.tuned"}, found


def refuse_chosen_images(tuned: Tuned, run: Run, checkpoint: Path) -> None:
    """Raises UserError if the run's evaluation split is the one that the settings were tuned on."""
    same = not tuned.other_root or _same_data(tuned.other_root, run.data.root)
    if same and tuned.split == run.data.eval_split:
        raise UserError(
            f"{checkpoint / DECODING} was tuned on {tuned.split}, the split to evaluate, which would flatter the "
            "result; set eval.tuned=false"
        )


def _same_data(one: str, two: str) -> bool:
    return one == two or same_folder(one, two)


def tuning_split(
    checkpoint: Path,
    overrides: Sequence[str] = (),
    split: str | None = None,
    *,
    unseen: bool = False,
    remedy: str = REMEDY,
) -> str:
    """The split to tune a checkpoint on: `split`, by default `data.selection_split`.

    Args:
        checkpoint: the checkpoint directory of an LM.
        overrides: `key=value` strings.
        split: its name, or None.
        unseen: the user says that `data.root` holds images that the run was neither trained on nor is reported for;
            then by default `data.eval_split`. Otherwise `data.root` counts as the data of training, wherever it is.
        remedy: how to get such images, for the errors.

    Raises UserError if there is no such split, if it is the one that is reported, and if the LM, an LM whose decoder it
    tuned, or its oracle was trained on its images.
    """
    run, _ = read_overridden(checkpoint, overrides)
    if not isinstance(run, LMRun):
        raise UserError(f"{checkpoint} is of stage {run.stage}, which predicts no tokens; give the run of an LM")
    before = read_config(checkpoint)
    assert isinstance(before, LMRun)
    trained = before.data
    oracle = read_oracle_config(find_oracle(checkpoint, run))[0]
    ancestors = (*run.ancestors, *oracle.ancestors)
    if unseen:
        if _same_data(trained.root, run.data.root):
            raise UserError(f"--unseen needs other data than the run's: data.root=FOLDER, which is now {trained.root}")
        chosen = split or run.data.eval_split
        _refuse_seen(ancestors, run.data.root, chosen, remedy)
        return chosen
    chosen = split or run.data.selection_split
    if not chosen:
        raise UserError(
            f"{checkpoint} was trained without a hold-out (data.selection_split is empty), so there is nothing to tune "
            f"on: {remedy}"
        )
    if chosen in (trained.eval_split, run.data.eval_split):
        raise UserError(
            f"split {chosen} is the one that is reported (data.eval_split), so it must not serve to tune: {remedy}"
        )
    for model, name in (("the LM", trained.train_split), ("its oracle", oracle.data.train_split)):
        if share_images(chosen, name):
            raise UserError(
                f"{model} was trained on images of split {chosen} (data.train_split={name}), so its tokens there are "
                f"better than on new images: {remedy}"
            )
    _refuse_seen(ancestors, trained.root, chosen, remedy)
    return chosen


def _refuse_seen(ancestors: tuple[Ancestor, ...], root: str, split: str, remedy: str) -> None:
    """Raises UserError if a run that this one started from was trained or chosen on images of a split in `root`."""
    for ancestor, used in seen(ancestors, root):
        if share_images(split, used):
            raise UserError(
                f"{ancestor.run}, which this run started from, was trained or chosen on images of split "
                f"{split} (its split {used}), so tokens there are better than on new images: {remedy}"
            )
