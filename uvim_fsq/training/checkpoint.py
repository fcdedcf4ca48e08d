"""Checkpoint directories: atomic, strict, safetensors for weights. Knows nothing of tasks or stages.

RUN/checkpoints/step_00001000/{config.yaml, model.safetensors, trainer/state.pt} and RUN/checkpoints/best.json.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn

from uvim_fsq.errors import UserError
from uvim_fsq.run_dirs import WEIGHTS, checkpoints, read_best, step_name
from uvim_fsq.run_dirs import resolve_checkpoint as resolve_checkpoint

STATE = Path("trainer") / "state.pt"


def clean_leftovers(run_dir: Path) -> None:
    """Removes half-written directories that a killed process left behind."""
    for leftover in (run_dir / "checkpoints").glob(".tmp_*"):
        shutil.rmtree(leftover, ignore_errors=True)


def save_checkpoint(
    run_dir: Path, step: int, *, config: str, weights: dict[str, torch.Tensor], state: dict[str, Any]
) -> Path:
    """Writes one checkpoint to a temporary name and renames it, so that no reader ever sees half of one.

    Raises UserError when the disk is full; the temporary directory is removed and earlier checkpoints stay as they are.
    """
    parent = run_dir / "checkpoints"
    final, temporary = parent / step_name(step), parent / f".tmp_{step_name(step)}"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        (temporary / "trainer").mkdir(parents=True)
        (temporary / "config.yaml").write_text(config)
        tensors = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
        safetensors.torch.save_file(tensors, temporary / WEIGHTS)
        torch.save(state, temporary / STATE)
        for file in (temporary / "config.yaml", temporary / WEIGHTS, temporary / STATE):
            _sync(file)
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
        _sync(parent)
    except (OSError, SafetensorError, RuntimeError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        reason = "the disk is full" if full else str(error).splitlines()[0]
        raise UserError(
            f"cannot save {final}: {reason}; earlier checkpoints are intact. "
            "Free space and go on with train.resume=auto"
        ) from error
    return final


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def prune(run_dir: Path, keep: int) -> None:
    """Deletes all but the newest `keep` checkpoints and the best one."""
    best = read_best(run_dir)
    protected = {step_name(best["step"])} if best else set()
    for old in checkpoints(run_dir)[:-keep]:
        if old.name not in protected:
            shutil.rmtree(old, ignore_errors=True)


def write_best(run_dir: Path, step: int, metric: str, value: float) -> None:
    """Records the best checkpoint, atomically."""
    file = run_dir / "checkpoints" / "best.json"
    temporary = file.with_name(".tmp_best.json")
    temporary.write_text(json.dumps({"step": step, "metric": metric, "value": value}) + "\n")
    temporary.replace(file)


def load_model_weights(model: nn.Module, checkpoint: Path) -> None:
    """Loads model.safetensors strictly: every name, every shape. Raises UserError naming the file and what differs."""
    file = checkpoint / WEIGHTS
    try:
        state = safetensors.torch.load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is truncated or no safetensors file ({error}); use another checkpoint") from error
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


def load_trainer_state(checkpoint: Path) -> dict[str, Any]:
    """Optimizer and counters of a checkpoint, never unpickling code. Raises UserError when missing or broken."""
    file = checkpoint / STATE
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a truncated file
        raise UserError(f"{file} is missing or broken; resume from another checkpoint") from error


def copy_checkpoint(source: Path, target: Path) -> None:
    """Copies configuration and weights (no trainer state) of a checkpoint to `target`, atomically."""
    if (target / WEIGHTS).is_file() and file_hash(target / WEIGHTS) == file_hash(source / WEIGHTS):
        return
    temporary = target.with_name(f".tmp_{target.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for name in ("config.yaml", WEIGHTS):
        shutil.copy2(source / name, temporary / name)
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)


def file_hash(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
