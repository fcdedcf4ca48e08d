"""From configurations and checkpoint directories to tasks and models: the only place that knows how both are named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from uvim_fsq.checkpoints.files import load_model_weights
from uvim_fsq.checkpoints.run_directory import (
    choose,
    find_oracle,
    inherit,
    read_oracle_config,
    read_overridden,
    resolve_checkpoint,
)
from uvim_fsq.config.plugins import plugin_code
from uvim_fsq.config.schema import LMRun, OracleRun, Run
from uvim_fsq.data.images import limit_pixels
from uvim_fsq.errors import UserError, enough_memory
from uvim_fsq.lm.base import TokenModel, build_token_model
from uvim_fsq.oracle.model import Oracle
from uvim_fsq.tasks.base import Task
from uvim_fsq.tasks.registry import load_plugins, task_class


def build_task(run: Run) -> Task:
    """The task of a resolved configuration."""
    load_plugins(run.plugins)
    limit_pixels(run.data.max_pixels)
    with plugin_code(f"task {run.task.name}, its start"):
        return task_class(run.task.name)(run.task.options)


def build_oracle(run: OracleRun, task: Task) -> Oracle:
    """A freshly initialised oracle for the task's label channels."""
    return Oracle(run.model, task.label_channels, run.data.image_size)


def build_lm(run: LMRun, oracle: Oracle, *, published: bool = True) -> TokenModel:
    """A freshly initialised LM; vocabulary and length are the oracle's.

    `published=False` leaves out the image encoder's published weights, for a checkpoint that brings its own.
    """
    model = run.model if published else replace(run.model, encoder=replace(run.model.encoder, weights="none"))
    return build_token_model(
        model,
        image_size=run.data.image_size,
        vocab_size=oracle.quantizer.codebook_size,
        length=oracle.code_length,
    )


def resolve_task(run: Run) -> Run:
    """Fills in what only the data can say of an oracle's task, e.g. the categories (`Task.resolve_config`).

    An LM takes it over from its oracle.
    """
    if isinstance(run, LMRun):
        return run
    load_plugins(run.plugins)
    with plugin_code(f"task {run.task.name}, resolve_config"):
        options = task_class(run.task.name).resolve_config(run.task.options, run.data.root)
    return replace(run, task=replace(run.task, options=options))


def resolve(run: Run) -> Run:
    """Fills an LM's configuration from its oracle's checkpoint, an oracle's from the data, and refuses impossible
    combinations."""
    return resolve_task(inherit(run))


def load_oracle(path: str | Path, run: LMRun | None = None) -> tuple[Oracle, Task]:
    """The frozen oracle of a checkpoint, in evaluation mode, and its task (with the LM's decoding keys, if given)."""
    oracle_run, checkpoint = read_oracle_config(path)
    task = build_task(run if run is not None and run.task is not None else oracle_run)
    oracle = build_oracle(oracle_run, task)
    load_model_weights(oracle, checkpoint)
    return oracle.eval().requires_grad_(False), task


@dataclass
class LoadedRun:
    """A checkpoint ready for use. `lm` is None for an oracle's checkpoint.

    `overrides`: key -> [trained value, present value] of the settings that were changed.
    `chosen` says how it was: the one `given`, the `last` of its run, or by what it is the best.
    """

    run: Run
    task: Task
    oracle: Oracle
    lm: TokenModel | None
    checkpoint: Path
    chosen: str = "given"
    overrides: dict[str, list[Any]] = field(default_factory=dict)


def load_checkpoint(path: str | Path, overrides: Sequence[str] = (), device: str | torch.device = "cpu") -> LoadedRun:
    """Everything behind a run or checkpoint directory of either stage: of a run its best checkpoint where one was to be
    chosen, by another split than `overrides` ask for and by the metric that they report, else its last.

    An LM's run carries its oracle in `oracle/`, so that it can be moved alone.
    """
    with enough_memory(f"{path} needs a machine with more"):
        return _load(path, overrides, device)


def _load(path: str | Path, overrides: Sequence[str], device: str | torch.device) -> LoadedRun:
    checkpoint, chosen, run, changed = _choose(path, overrides)
    if isinstance(run, OracleRun):
        task = build_task(run)
        oracle = build_oracle(run, task)
        load_model_weights(oracle, checkpoint)
        return LoadedRun(run, task, oracle.eval().to(device), None, checkpoint, chosen, changed)
    place = find_oracle(checkpoint, run)
    if "oracle" in changed and place != Path(run.oracle):
        raise UserError(f"oracle={run.oracle}: this run carries its own oracle, {place}; a trained LM cannot follow")
    oracle, task = load_oracle(place, run)
    lm = build_lm(run, oracle, published=False)
    load_model_weights(lm, checkpoint)
    return LoadedRun(run, task, oracle.to(device), lm.eval().to(device), checkpoint, chosen, changed)


def _choose(path: str | Path, overrides: Sequence[str]) -> tuple[Path, str, Run, dict[str, list[Any]]]:
    checkpoint, watch = choose(path)
    run, changed = read_overridden(checkpoint, overrides)
    if watch is None:
        return checkpoint, "given" if checkpoint == Path(path) else "last", run, changed
    if watch.split == run.data.eval_split or watch.metric != build_task(run).choosing_metric:
        # What is reported must not have chosen.
        checkpoint = resolve_checkpoint(path, prefer="last")
        return checkpoint, "last", *read_overridden(checkpoint, overrides)
    return checkpoint, watch.describe(), run, changed
