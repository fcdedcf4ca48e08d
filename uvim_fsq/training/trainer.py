"""The state of a training run: saving, resuming and evaluating it. `loop.fit` drives it."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from uvim_fsq import processes
from uvim_fsq.checkpoints import files as ckpt
from uvim_fsq.checkpoints.identity import check_resume
from uvim_fsq.checkpoints.run_directory import (
    Evaluation,
    Selection,
    best,
    checkpoints,
    read_config,
    read_evaluation,
    resume_from,
    step_name,
    suggesting_earlier,
)
from uvim_fsq.config.parse import dump_yaml
from uvim_fsq.config.rules import check_warmup
from uvim_fsq.config.schema import Run
from uvim_fsq.console import say
from uvim_fsq.data.loader import TrainLoader
from uvim_fsq.errors import UserError
from uvim_fsq.files import write_text, write_whole
from uvim_fsq.training.initialize import initialize
from uvim_fsq.training.optim import load_optimizers
from uvim_fsq.training.progress import Progress
from uvim_fsq.training.stages import Stage, selection_data
from uvim_fsq.training.step import Stepper


class Trainer:
    """The state of a training run: the `Stepper`, the loader and the run directory.

    Raises UserError for missing or unreadable data.
    """

    def __init__(self, stage: Stage, run: Run) -> None:
        self.stage, self.run, self.train, self.out = stage, run, run.train, Path(run.train.out)
        source = stage.task.source(run.data.root, run.data.train_split)
        # Fail now, rather than after hours of training, if evaluation lacks something.
        stage.task.metric(stage.task.source(run.data.root, run.data.eval_split))
        self.selection = self._selection()
        state = processes.state()
        self.loader = TrainLoader(
            source,
            stage.task,
            run.data,
            batch_size=run.train.batch_size,
            seed=run.train.seed,
            accumulate=run.train.accumulate,
            rank=state.process_index,
            world=state.num_processes,
        )
        per_epoch = self.loader.plan.steps_per_epoch
        epochs = run.train.epochs
        total = run.train.steps if run.train.steps is not None else max(1, round((epochs or 0) * per_epoch))
        check_warmup(run, total)
        self.stepper = Stepper(stage, run, total)
        self.accelerator, self.device = self.stepper.accelerator, self.stepper.device

    @property
    def total(self) -> int:
        """Optimizer steps of the whole run."""
        return self.stepper.total

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return self.stepper.step

    def _selection(self) -> Selection:
        task, data, train = self.stage.task, selection_data(self.run.data), self.run.train
        source = task.source(data.root, data.eval_split)
        limit = train.eval_limit if train.eval_limit is not None else self.run.eval.limit
        # A checkpoint must not be selected by the results that will be reported.
        chooses = data.eval_split != self.run.data.eval_split
        return Selection(
            split=data.eval_split,
            images=len(source) if limit is None else min(limit, len(source)),
            protocol=task.metric(source).protocol,
            metric=task.choosing_metric or "" if chooses else "",
            smaller_is_better=task.smaller_is_better,
        )

    # --- checkpoints -------------------------------------------------------------------------------------------

    @property
    def last_checkpoint(self) -> Path:
        """The path of the current step's checkpoint, whether or not it was saved."""
        return self.out / "checkpoints" / step_name(self.step)

    def resume(self) -> None:
        """Loads the checkpoint that `train.resume` asks for, if any; else a new run starts from `init_from`, if set.

        Raises UserError if a process lacks the checkpoint or loads a different one than the main process, if the
        checkpoint is damaged, and if a run would be overwritten.
        """
        path = processes.broadcast(self._resume_from() if processes.is_main() else None)
        if path is None:
            self._initialize()
            processes.same(self.stage.oracle_sha256, "the oracle's run")
            return
        processes.same(self._load(path), path)
        if processes.is_main():
            self._set_newer_aside()

    def _initialize(self) -> None:
        """Takes the weights of `init_from`, if it is set."""
        if self.run.init_from:
            digest = initialize(self.stage.model, self.run, self.stage.oracle_sha256)
            processes.same(digest, f"init_from={self.run.init_from}")
            if self.stepper.ema is not None:
                self.stepper.ema = self.stepper.ema_start()

    def _resume_from(self) -> Path | None:
        # Detect damaged evaluation records now, rather than when old checkpoints are deleted.
        best(self.out)
        return resume_from(self.out, self.train.resume)

    def _load(self, path: Path) -> tuple[Any, ...]:
        """Loads a checkpoint. Returns values that must be equal in all processes."""
        if not path.is_dir():
            raise UserError(
                f"process {self.accelerator.process_index} has no {path}; the run directory must be shared by all "
                "machines"
            )
        with suggesting_earlier(self.run, path):
            trained = read_config(path)
            state, state_hash = ckpt.load_trainer_state(path)
            if "optimizers" not in state:
                raise UserError(
                    f"{path} was imported, so its training cannot be resumed; evaluate it, or train an LM on it"
                )
        check_resume(self.run, trained)
        with suggesting_earlier(self.run, path):
            weights_hash = ckpt.load_model_weights(self.stage.model, path)
        stepper = self.stepper
        if stepper.ema is not None:
            # If the checkpoint has no average, averaging starts from its weights.
            stepper.ema = stepper.ema_start()
        if "raw" in state:
            self.stage.model.load_state_dict({**self.stage.model.state_dict(), **state["raw"]})
        load_optimizers(stepper.optimizers, state["optimizers"])
        for name, module in self.stage.auxiliary.items():
            module.load_state_dict(state["auxiliary"][name])
        if self.accelerator.scaler is not None and "scaler" in state:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.loader.bad = dict(state.get("bad_samples", {}))
        stepper.step = int(state["step"])
        if self.step > self.total:
            raise UserError(
                f"{path} is at step {self.step}, but training ends after {self.total} steps; "
                "give a longer train.steps or train.epochs, or resume from an earlier checkpoint"
            )
        return self.step, weights_hash, state_hash, self.stage.oracle_sha256

    def _set_newer_aside(self) -> None:
        moved = ckpt.set_aside(self.out, self.step)
        if self.step < self.total:
            # The result of a run is invalid once its training continues.
            (self.out / "evaluation.json").unlink(missing_ok=True)
        if moved:
            say(
                f"continuing from step {self.step}; {len(moved)} newer checkpoint(s) moved to {moved[0].parent}, "
                "delete them if they are not needed"
            )

    def save(self) -> None:
        """Writes a checkpoint of the current step from the main process.

        Raises UserError in all processes, without saving, if weights or optimizer state are not finite.
        """
        self._check_finite()
        if processes.is_main():
            state: dict[str, Any] = {
                "step": self.step,
                "optimizers": {name: o.state_dict() for name, o in self.stepper.optimizers.items()},
                "auxiliary": {name: module.state_dict() for name, module in self.stage.auxiliary.items()},
                "bad_samples": self.loader.bad,
            }
            if self.accelerator.scaler is not None:
                state["scaler"] = self.accelerator.scaler.state_dict()
            weights = dict(self.stage.model.state_dict())
            if self.stepper.ema is not None:
                state["raw"] = {name: p.detach().cpu() for name, p in self.stage.model.named_parameters()}
                weights |= self.stepper.ema
            ckpt.save_checkpoint(
                self.out,
                self.step,
                config=dump_yaml(self.run),
                weights=weights,
                state=state,
                oracle_sha256=self.stage.oracle_sha256,
            )
        processes.wait()

    def _check_finite(self) -> None:
        modules = (self.stage.model, *self.stage.auxiliary.values())
        tensors = [x for module in modules for x in module.state_dict().values()]
        tensors += (self.stepper.ema or {}).values()
        tensors += [
            value
            for optimizer in self.stepper.optimizers.values()
            for state in optimizer.state.values()
            for value in state.values()
        ]
        checked = [x for x in tensors if isinstance(x, torch.Tensor) and x.is_floating_point() and x.numel()]
        # The infinity norm takes few kernels, propagates inf and NaN, and cannot overflow as a sum of squares could.
        largest = nn.utils.get_total_norm(checked, math.inf)
        broken = self.stepper.sum((~torch.isfinite(largest)).float())
        if broken:
            raise UserError(
                f"the weights or the optimizer's state are not finite after step {self.step}; {self.last_good()}"
            )

    def last_good(self) -> str:
        """The last good checkpoint and advice, for error messages about diverged training."""
        kept = checkpoints(self.out)
        remedy = f"the last good checkpoint is {kept[-1]}" if kept else "no checkpoint was written yet"
        return (
            f"{remedy}. Lower optim.lr, lengthen optim.warmup_steps, set optim.clip_norm, "
            "or use train.precision=bf16 or fp32"
        )

    def tidy(self) -> None:
        """Deletes old checkpoints. If the newest one is to be evaluated, call this only afterwards."""
        if processes.is_main():
            ckpt.prune(self.out, self.train.keep)

    # --- evaluation --------------------------------------------------------------------------------------------

    def evaluates_now(self) -> bool:
        """Whether to evaluate after the current step."""
        every = self.train.eval_every
        return self.step == self.total or (every is not None and self.step > 0 and self.step % every == 0)

    def lacks_evaluation(self) -> bool:
        """Whether the current step's checkpoint still has to be evaluated, because training was killed before that."""
        # A run that continues the checkpoint of another run does not contain that checkpoint.
        saved = self.last_checkpoint.is_dir() and self.evaluates_now()
        return processes.broadcast(saved and read_evaluation(self.last_checkpoint) is None)

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[nn.Module]:
        """A context in which the model has its averaged weights, if there are any, and is in evaluation mode."""
        model = self.stage.model
        raw = {name: p.detach().clone() for name, p in model.named_parameters()} if self.stepper.ema is not None else {}
        model.load_state_dict({**model.state_dict(), **(self.stepper.ema or {})})
        was_training = model.training
        try:
            yield model.eval()
        finally:
            model.load_state_dict({**model.state_dict(), **raw})
            model.train(was_training)

    def evaluate(self, progress: Progress) -> None:
        """Evaluates the current step's checkpoint, and saves metrics and a panel.

        The checkpoint must exist. It is marked as evaluated at the end, so that a killed evaluation is repeated.
        """
        start = time.perf_counter()
        with self.averaged_weights() as model:
            figures = self.stage.evaluate(model, self.train.eval_limit, self.device)
            panel = self.stage.panel(model, self.device) if processes.is_main() else None
        if panel is not None:
            picture = Image.fromarray(panel)
            place = self.out / "panels" / f"{step_name(self.step)}.png"
            write_whole(place, lambda path: picture.save(path, format="PNG"))
        progress.evaluated(self.step, figures, panel, time.perf_counter() - start)
        if processes.is_main():
            ckpt.record_evaluation(self.last_checkpoint, Evaluation(self.selection, figures))

    def write_run_files(self) -> None:
        """Writes the files of the run directory other than checkpoints."""
        write_text(self.out / "config.yaml", dump_yaml(self.run))
        self.stage.write_artifacts(self.out)
