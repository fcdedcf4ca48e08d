"""Checkpoints of one number, for tests about files and choices."""

from __future__ import annotations

from pathlib import Path

import torch

from uvim_fsq.checkpoints import files as ckpt
from uvim_fsq.checkpoints.run_directory import Evaluation, Selection, checkpoints

HOLDOUT = Selection("holdout", 10, "nyu_depth/uvim", "rmse", True)


def save(run_dir: Path, step: int, value: float | None = None, watch: Selection = HOLDOUT) -> Path:
    """A checkpoint of one number, evaluated with `value` as its error."""
    weights = {"weight": torch.tensor([[float(step)]])}
    path = ckpt.save_checkpoint(run_dir, step, config="a: 1\n", weights=weights, state={"step": step})
    if value is not None:
        ckpt.record_evaluation(path, Evaluation(watch, {"rmse": value, "images": 10.0}))
    return path


def steps(run_dir: Path) -> list[int]:
    """The steps of a run's checkpoints."""
    return [int(path.name.removeprefix("step_")) for path in checkpoints(run_dir)]
