"""Comparison of a run with tokens and a direct run: the same task, protocol and images for both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from uvim_fsq.checkpoints.loading import LoadedDirect, LoadedRun, load_direct
from uvim_fsq.errors import UserError
from uvim_fsq.evaluation.evaluator import Evaluator
from uvim_fsq.tasks.configuration import without_token_keys


def load_compared(
    path: str | Path, loaded: LoadedRun | LoadedDirect, overrides: Sequence[str], device: torch.device
) -> LoadedDirect:
    """Loads the direct run to compare `loaded` with, with the overrides of `loaded` as far as they apply.

    Raises UserError if it is not a direct run, or if `loaded` is one too.
    """
    if isinstance(loaded, LoadedDirect):
        raise UserError(f"{loaded.checkpoint} is of a direct run; compare an oracle's or an LM's run with one")
    return load_direct(path, without_token_keys(overrides), device)


def measured_on(evaluator: Evaluator) -> dict[str, Any]:
    """What the figures of an evaluator are about: task, protocol, number of images and, as `data.NAME`, their source.

    The folder does not matter, because the same data may lie in several places.
    """
    task, source = evaluator.task, evaluator.source
    limit = len(source) if evaluator.limit is None else evaluator.limit
    return {
        "task": task.name,
        "protocol": task.metric(source).protocol,
        "images": min(limit, len(source)),
        **{f"data.{key}": value for key, value in source.info.items() if key != "root"},
    }


def refuse_different(evaluator: Evaluator, other: Evaluator, run: object, other_run: object) -> None:
    """Raises UserError if the figures of `other_run` cannot be compared with those of `run`."""
    first, second = measured_on(evaluator), measured_on(other)
    for key in dict.fromkeys((*first, *second)):
        if first.get(key) != second.get(key):
            raise UserError(
                f"{key} is {first.get(key)} for {run} and {second.get(key)} for {other_run}: their figures cannot be "
                "compared; give the same data.root=, data.eval_split= or task.protocol=, which then apply to both"
            )


def refuse_other_images(rows: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]], other: object) -> None:
    """Raises UserError unless the per-image metrics `rows` and `others` are about the same images."""
    if [row["id"] for row in rows] != [row["id"] for row in others]:
        raise UserError(f"the images of {other} are others than those of the run it is compared with; give data.root=")
