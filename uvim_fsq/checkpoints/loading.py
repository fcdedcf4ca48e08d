"""Builds tasks and models from configurations, and loads them from checkpoint directories."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from uvim_fsq.checkpoints.ancestors import inherit
from uvim_fsq.checkpoints.files import load_model_weights
from uvim_fsq.checkpoints.hub import local_run
from uvim_fsq.checkpoints.run_directory import (
    choose,
    find_oracle,
    read_oracle_config,
    resolve_checkpoint,
)
from uvim_fsq.checkpoints.tuned import DECODING, FROM_RUN, Tuned, read_for_prediction, refuse_chosen_images
from uvim_fsq.config.plugins import plugin_code
from uvim_fsq.config.rules import check_context_weight
from uvim_fsq.config.schema import DirectRun, LMRun, OracleRun, Run
from uvim_fsq.data.images import limit_pixels
from uvim_fsq.direct.model import DirectModel
from uvim_fsq.errors import UserError, enough_memory
from uvim_fsq.layers import lay_out_weights
from uvim_fsq.lm.base import TokenModel, build_token_model
from uvim_fsq.oracle.label_decoder import TrainedDecoder
from uvim_fsq.oracle.model import Oracle
from uvim_fsq.tasks.base import Task
from uvim_fsq.tasks.registry import load_plugins, task_class


def build_task(run: Run) -> Task:
    """Builds the task of a resolved configuration. Raises UserError for data settings that make no sense for it."""
    load_plugins(run.plugins)
    limit_pixels(run.data.max_pixels)
    if run.data.color_jitter is not None and task_class(run.task.name).labels_are_colors:
        raise UserError(
            f"data.color_jitter={list(run.data.color_jitter)}: the labels of {run.task.name} are the colors of the "
            "photo, which must stay as they are; leave it out"
        )
    with plugin_code(f"task {run.task.name}, its start"):
        return task_class(run.task.name)(run.task.options)


def build_oracle(run: OracleRun, task: Task) -> Oracle:
    """Builds a freshly initialized oracle for the task's label channels."""
    return Oracle(run.model, task.label_channels, run.data.image_size)


def build_lm(run: LMRun, oracle: Oracle, *, published: bool = True) -> TokenModel:
    """Builds a freshly initialized LM with the vocabulary and code length of the oracle.

    With `model.decoder: trained` it contains a copy of the oracle's decoder. `published=False` skips the published
    weights of the image encoder, because a checkpoint will replace them.

    Raises UserError if the decoder is to see image features and the token model has none.
    """
    model = run.model if published else replace(run.model, encoder=replace(run.model.encoder, weights="none"))
    lm = build_token_model(
        model,
        image_size=run.data.image_size,
        vocab_size=oracle.quantizer.codebook_size,
        length=oracle.code_length,
    )
    if model.decoder == "trained":
        features = lm.num_features if model.decoder_context == "encoder" else None
        if model.decoder_context == "encoder" and features is None:
            raise UserError(
                f"model.decoder_context=encoder: token model {model.kind} has no image features; set it to pixels"
            )
        lm.label_decoder = TrainedDecoder(oracle, features)
    return lm


def build_direct(run: DirectRun, task: Task, *, published: bool = True) -> DirectModel:
    """Builds a freshly initialized direct model for the task's label channels; `published` as in `build_lm`."""
    model = run.model if published else replace(run.model, encoder=replace(run.model.encoder, weights="none"))
    return DirectModel(model, task.label_channels, run.data.image_size)


def resolve_task(run: Run) -> Run:
    """Completes a run's task options from the data, e.g. with the categories (`Task.resolve_config`).

    An LM is returned unchanged, because it inherits its task from the oracle.
    """
    if isinstance(run, LMRun):
        return run
    load_plugins(run.plugins)
    limit_pixels(run.data.max_pixels)
    with plugin_code(f"task {run.task.name}, resolve_config"):
        options = task_class(run.task.name).resolve_config(run.task.options, run.data.root)
    return replace(run, task=replace(run.task, options=options))


def resolve(run: Run) -> Run:
    """Completes an LM's configuration from its oracle's checkpoint, and any other from the data.

    Raises UserError for invalid combinations.
    """
    return resolve_task(inherit(run))


def load_oracle(path: str | Path, run: LMRun | None = None) -> tuple[Oracle, Task]:
    """Loads the oracle of a run or checkpoint directory, frozen and in evaluation mode, and its task.

    If `run` is given and resolved, the task is built from its options, so that the LM's decoding options apply. Raises
    UserError if the run mixes its predictions with a context that the oracle does not have.
    """
    oracle_run, checkpoint = read_oracle_config(path)
    if run is not None:
        check_context_weight(run.eval.context_weight, oracle_run.model.context, path)
    task = build_task(run if run is not None and run.task is not None else oracle_run)
    oracle = build_oracle(oracle_run, task)
    load_model_weights(oracle, checkpoint)
    return oracle.eval().requires_grad_(False), task


@dataclass(kw_only=True)
class LoadedCheckpoint:
    """A checkpoint ready for use, of any stage.

    Attributes:
        task: the task of the labels.
        checkpoint: the checkpoint directory.
        chosen: how the checkpoint was chosen: "given", "last", or a description of the metric it is the best by.
        overrides: key -> [trained value, current value] of the changed settings.
        decoding_from: where the decoding settings come from: "the run", or a description of the tuning.
    """

    task: Task
    checkpoint: Path
    chosen: str = "given"
    overrides: dict[str, list[Any]] = field(default_factory=dict)
    decoding_from: str = FROM_RUN


@dataclass(kw_only=True)
class LoadedRun(LoadedCheckpoint):
    """A checkpoint with tokens.

    Attributes:
        run: its configuration, with overrides applied.
        oracle: the oracle; for an LM's checkpoint, the one it was trained on.
        lm: the token model; None for an oracle's checkpoint.
    """

    run: OracleRun | LMRun
    oracle: Oracle
    lm: TokenModel | None

    def to(self, device: torch.device) -> None:
        """Moves the models to the device."""
        self.oracle.to(device)
        if self.lm is not None:
            self.lm.to(device)


@dataclass(kw_only=True)
class LoadedDirect(LoadedCheckpoint):
    """A checkpoint of the direct baseline: `run` is its configuration, with overrides applied."""

    run: DirectRun
    model: DirectModel

    def to(self, device: torch.device) -> None:
        """Moves the model to the device."""
        self.model.to(device)


def load_checkpoint(
    path: str | Path,
    overrides: Sequence[str] = (),
    device: str | torch.device = "cpu",
    *,
    tuned: bool = True,
) -> LoadedRun:
    """Like `load_any` for a run with tokens. Raises UserError for a direct run."""
    loaded = load_any(path, overrides, device, tuned=tuned)
    if isinstance(loaded, LoadedDirect):
        raise UserError(f"{path} is a run of the direct baseline, which has no tokens; give an oracle's or an LM's run")
    return loaded


def load_direct(path: str | Path, overrides: Sequence[str] = (), device: str | torch.device = "cpu") -> LoadedDirect:
    """Like `load_any` for a direct run. Raises UserError for a run with tokens."""
    loaded = load_any(path, overrides, device)
    if isinstance(loaded, LoadedRun):
        raise UserError(f"{path} is a run of stage {loaded.run.stage!r}; give one of stage 'direct'")
    return loaded


def load_any(
    path: str | Path,
    overrides: Sequence[str] = (),
    device: str | torch.device = "cpu",
    *,
    tuned: bool = True,
) -> LoadedRun | LoadedDirect:
    """Loads the models and task of a run or checkpoint directory of any stage.

    Of a run, this is the best checkpoint if training selected one by the metric that is reported now, and on a split
    other than the one evaluated now. Otherwise it is the last checkpoint. An LM's run contains a copy of its oracle, so
    it can be moved on its own.

    Args:
        path: the run or checkpoint directory.
        overrides: `key=value` strings.
        device: where to put the models.
        tuned: apply the settings that `uvim-fsq tune` chose for the checkpoint, unless `eval.tuned` is false.

    Raises UserError for anything missing, damaged or inconsistent.
    """
    with enough_memory(f"{path} needs a machine with more"):
        loaded = _load(path, overrides, device, tuned)
        if torch.device(device).type == "cpu":
            for model in [loaded.model] if isinstance(loaded, LoadedDirect) else [loaded.oracle, loaded.lm]:
                if model is not None:
                    lay_out_weights(model)
        return loaded


def with_overrides(loaded: LoadedRun | LoadedDirect, overrides: Sequence[str]) -> LoadedRun | LoadedDirect:
    """The same checkpoint and models with the settings that `load_any` would give them; the models are shared.

    Raises UserError as `load_any` does.
    """
    checkpoint, _, run, changed, tuned = _choose(loaded.checkpoint, overrides, True)
    about: dict[str, Any] = {"task": build_task(run), "run": run, "overrides": changed}
    if isinstance(loaded, LoadedRun) and isinstance(run, LMRun):
        _refuse_other_oracle(run, changed, find_oracle(checkpoint, run))
        check_context_weight(run.eval.context_weight, loaded.oracle.config.context, checkpoint)
        about["decoding_from"] = FROM_RUN if tuned is None else tuned.describe(run.eval)
    return replace(loaded, **about)


def _refuse_other_oracle(run: LMRun, changed: dict[str, list[Any]], place: Path) -> None:
    if "oracle" in changed and place != Path(run.oracle):
        raise UserError(
            f"oracle={run.oracle}: this run has its own oracle, {place}; a trained LM cannot change it, leave it out"
        )


def _load(
    path: str | Path, overrides: Sequence[str], device: str | torch.device, use_tuned: bool
) -> LoadedRun | LoadedDirect:
    checkpoint, chosen, run, changed, tuned = _choose(path, overrides, use_tuned)
    about: dict[str, Any] = {"checkpoint": checkpoint, "chosen": chosen, "overrides": changed}
    if isinstance(run, DirectRun):
        task = build_task(run)
        model = build_direct(run, task, published=False)
        load_model_weights(model, checkpoint)
        return LoadedDirect(run=run, task=task, model=model.eval().to(device), **about)
    if isinstance(run, OracleRun):
        task = build_task(run)
        oracle = build_oracle(run, task)
        load_model_weights(oracle, checkpoint)
        return LoadedRun(run=run, task=task, oracle=oracle.eval().to(device), lm=None, **about)
    place = find_oracle(checkpoint, run)
    _refuse_other_oracle(run, changed, place)
    oracle, task = load_oracle(place, run)
    lm = build_lm(run, oracle, published=False)
    load_model_weights(lm, checkpoint)
    if tuned is not None:
        about["decoding_from"] = tuned.describe(run.eval)
    return LoadedRun(run=run, task=task, oracle=oracle.to(device), lm=lm.eval().to(device), **about)


def _choose(
    path: str | Path, overrides: Sequence[str], use_tuned: bool
) -> tuple[Path, str, Run, dict[str, list[Any]], Tuned | None]:
    path = local_run(path)
    checkpoint, selection = choose(path)
    run, changed, tuned = read_for_prediction(checkpoint, overrides, tuned=use_tuned)
    chosen = "given" if checkpoint == path else "last"
    if selection is not None:
        chosen = selection.describe()
        if selection.split == run.data.eval_split or selection.metric != build_task(run).choosing_metric:
            # The reported results must not have selected the checkpoint.
            checkpoint, chosen = resolve_checkpoint(path, prefer="last"), "last"
            run, changed, tuned = read_for_prediction(checkpoint, overrides, tuned=use_tuned)
    if tuned is not None:
        refuse_chosen_images(tuned, run, checkpoint)
        if tuned.metric != build_task(run).choosing_metric:
            raise UserError(
                f"{checkpoint / DECODING} was tuned by {tuned.metric}, but the task's protocol now reports another "
                "metric; set eval.tuned=false"
            )
    return checkpoint, chosen, run, changed, tuned
