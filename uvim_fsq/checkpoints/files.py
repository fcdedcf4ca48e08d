"""Writes checkpoint directories atomically and reads them strictly. Weights are stored as safetensors.

The module is independent of tasks and stages. The names of the files, and the choice of a run's checkpoint, are in
`run_directory`.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn

from uvim_fsq.checkpoints.run_directory import (
    CONFIG,
    FIGURES,
    STATE,
    SUMS,
    WEIGHTS,
    Evaluation,
    best,
    checked_hash,
    checkpoints,
    file_hash,
    step_name,
)
from uvim_fsq.errors import UserError
from uvim_fsq.files import disk_is_full, sync, write_json, writing

#: Where newer checkpoints are moved when training resumes from an older one.
SET_ASIDE = "set_aside"


def save_checkpoint(
    run_dir: Path,
    step: int,
    *,
    config: str,
    weights: dict[str, torch.Tensor],
    state: dict[str, Any],
    oracle_sha256: str | None = None,
) -> Path:
    """Writes a checkpoint under a temporary name and renames it, so that readers never see an incomplete one.

    Args:
        run_dir: the run directory.
        step: optimizer steps taken.
        config: the resolved configuration as YAML.
        weights: the model's state dict.
        state: the trainer's state; must load with `weights_only=True`.
        oracle_sha256: SHA-256 of the weights of the oracle that an LM is trained on.

    Returns the checkpoint directory. Raises UserError if writing fails, for example because the disk is full. The
    temporary directory is then removed, and earlier checkpoints are unchanged.
    """
    parent = run_dir / "checkpoints"
    final, temporary = parent / step_name(step), parent / f".tmp_{step_name(step)}"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        (temporary / STATE).parent.mkdir(parents=True)
        (temporary / CONFIG).write_text(config, encoding="utf-8")
        tensors = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
        safetensors.torch.save_file(tensors, temporary / WEIGHTS)
        torch.save(state, temporary / STATE)
        sums = {name: file_hash(temporary / name) for name in (CONFIG, WEIGHTS, STATE)}
        _write_sums(temporary, sums | ({"oracle": oracle_sha256} if oracle_sha256 else {}))
        for path in (CONFIG, WEIGHTS, STATE, SUMS, "trainer", "."):
            sync(temporary / path)
        remove(final)
        temporary.rename(final)
        sync(parent)
    except (OSError, SafetensorError, RuntimeError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        reason = "the disk is full" if disk_is_full(error) else next(iter(str(error).splitlines()), repr(error))
        raise UserError(
            f"cannot save {final}: {reason}; earlier checkpoints are intact. "
            "Free space and continue with train.resume=auto"
        ) from error
    return final


def _write_sums(folder: Path, sums: dict[str, str]) -> None:
    (folder / SUMS).write_text(json.dumps(sums, indent=1) + "\n", encoding="utf-8")


def copy_checkpoint(source: Path, target: Path) -> None:
    """Atomically copies the configuration and weights of a checkpoint, without the trainer state, to `target`.

    Does nothing if `target` is already an identical copy. Raises UserError for a damaged source or a full disk.
    """
    wanted = {name: checked_hash(source, name) for name in (CONFIG, WEIGHTS)}
    if all((target / name).is_file() and file_hash(target / name) == wanted[name] for name in wanted):
        return
    temporary = target.with_name(f".tmp_{target.name}")
    with writing(target):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for name in wanted:
            shutil.copyfile(source / name, temporary / name)
        _write_sums(temporary, wanted)
        for name in (*wanted, SUMS):
            sync(temporary / name)
        remove(target)
        temporary.rename(target)
        sync(target.parent)


def record_evaluation(checkpoint: Path, evaluation: Evaluation) -> None:
    """Records the results of training's own evaluation of a checkpoint."""
    write_json(checkpoint / FIGURES, {**asdict(evaluation.selection), "figures": evaluation.figures})


def remove(path: Path) -> None:
    """Deletes a directory atomically: if the process is killed, no partial directory keeps its name."""
    if not path.exists():
        return
    trash = path.with_name(f".trash_{path.name}")
    shutil.rmtree(trash, ignore_errors=True)
    path.rename(trash)
    shutil.rmtree(trash, ignore_errors=True)


def clean_leftovers(run_dir: Path) -> None:
    """Removes files and directories that a killed process left partially written or deleted."""
    folder = run_dir / "checkpoints"
    for place in (run_dir, folder):
        for leftover in (*place.glob(".tmp_*"), *place.glob(".trash_*")):
            shutil.rmtree(leftover, ignore_errors=True)
    for leftover in folder.glob("step_*"):
        if not (leftover / WEIGHTS).is_file():
            shutil.rmtree(leftover, ignore_errors=True)
    for leftover in (*folder.rglob(".*.partial"), *(run_dir / "panels").glob(".*.partial")):
        leftover.unlink(missing_ok=True)


def prune(run_dir: Path, keep: int) -> None:
    """Deletes all but the newest `keep` checkpoints and the best one."""
    found = best(run_dir)
    for old in checkpoints(run_dir)[:-keep]:
        if found is None or old != found[0]:
            remove(old)


def set_aside(run_dir: Path, step: int) -> list[Path]:
    """Moves checkpoints after `step` to RUN/set_aside, where resuming ignores them, and returns their new paths.

    Panels after `step` are deleted.
    """
    moved: list[Path] = []
    for newer in checkpoints(run_dir):
        if newer.name > step_name(step):
            place, number = run_dir / SET_ASIDE / newer.name, 1
            while place.exists():
                number += 1
                place = place.with_name(f"{newer.name}_{number}")
            place.parent.mkdir(exist_ok=True)
            newer.rename(place)
            moved.append(place)
    for picture in (run_dir / "panels").glob("step_*.png"):
        if picture.stem > step_name(step):
            picture.unlink()
    return moved


def read_weights(checkpoint: Path) -> tuple[dict[str, torch.Tensor], str]:
    """The tensors of model.safetensors, and the file's SHA-256. Raises UserError if the file is damaged."""
    file = checkpoint / WEIGHTS
    digest = checked_hash(checkpoint, WEIGHTS)
    try:
        return safetensors.torch.load_file(file), digest
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is truncated or not a safetensors file ({error}); use another checkpoint") from error


def load_model_weights(model: nn.Module, checkpoint: Path) -> str:
    """Loads model.safetensors into `model`, requiring all names and shapes to match. Returns its SHA-256.

    Raises UserError, naming the file and the differences, if the file is damaged or does not match the model.
    """
    file = checkpoint / WEIGHTS
    state, digest = read_weights(checkpoint)
    expected = model.state_dict()
    problems = [f"missing {name}" for name in expected if name not in state]
    problems += [f"unexpected {name}" for name in state if name not in expected]
    problems += [
        f"{name} is {list(state[name].shape)} instead of {list(value.shape)}"
        for name, value in expected.items()
        if name in state and state[name].shape != value.shape
    ]
    if problems:
        shown = "; ".join(problems[:3]) + (f" and {len(problems) - 3} more" if len(problems) > 3 else "")
        raise UserError(f"{file} does not fit its configuration: {shown}. Was config.yaml (levels, widths) changed?")
    model.load_state_dict(state, strict=True)
    return digest


def load_trainer_state(checkpoint: Path) -> tuple[dict[str, Any], str]:
    """Returns the trainer state of a checkpoint and the file's SHA-256. Never unpickles code.

    Raises UserError if the file is missing or damaged.
    """
    digest = checked_hash(checkpoint, STATE)
    try:
        return torch.load(checkpoint / STATE, map_location="cpu", weights_only=True), digest
    except Exception as error:  # torch raises many types for a truncated file
        raise UserError(f"{checkpoint / STATE} is broken; resume from another checkpoint") from error
