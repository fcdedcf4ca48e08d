"""The state of one training run: what is saved, how it goes on, and how it is evaluated. `loop.fit` drives it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image
from torch import nn

from uvim_fsq import processes
from uvim_fsq.config import Run
from uvim_fsq.config_io import dump_yaml
from uvim_fsq.data.loader import TrainLoader
from uvim_fsq.errors import UserError
from uvim_fsq.identity import check_resume
from uvim_fsq.run_dirs import read_config
from uvim_fsq.training import checkpoint as ckpt
from uvim_fsq.training.progress import Progress
from uvim_fsq.training.stages import Stage
from uvim_fsq.training.step import Stepper


class Trainer(Stepper):
    """State of one training run; `fit` drives it."""

    def __init__(self, stage: Stage, run: Run) -> None:
        super().__init__(stage, run, total=0)
        self.out = Path(run.train.out)
        source = stage.task.source(run.data.root, run.data.train_split)
        # What evaluation lacks is better said now than after hours of training.
        for split in {run.data.eval_split, run.data.watch_split or run.data.eval_split}:
            stage.task.metric(stage.task.source(run.data.root, split))
        self.loader = TrainLoader(
            source,
            stage.task,
            run.data,
            batch_size=run.train.batch_size,
            seed=run.train.seed,
            accumulate=run.train.accumulate,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
        )
        per_epoch = self.loader.plan.steps_per_epoch
        epochs = run.train.epochs
        self.total = run.train.steps if run.train.steps is not None else max(1, round((epochs or 0) * per_epoch))

    # --- checkpoints -------------------------------------------------------------------------------------------

    def resume(self) -> None:
        """Continues from train.resume; refuses to overwrite a run silently."""
        existing = ckpt.checkpoints(self.out)
        how = self.train.resume
        if how == "no":
            if existing:
                raise UserError(
                    f"{self.out} already holds checkpoints; continue with train.resume=auto or choose another train.out"
                )
            return
        if how == "auto" and not existing:
            return
        path = existing[-1] if how == "auto" else ckpt.resolve_checkpoint(how, prefer="last")
        state = ckpt.load_trainer_state(path)
        if "optimizer" not in state:
            raise UserError(f"{path} was imported, its training cannot go on; evaluate it, or train an LM on it")
        check_resume(self.run, read_config(path), step=int(state["step"]), total=self.total)
        ckpt.load_model_weights(self.stage.model, path)
        if self.ema is not None and "raw" in state:
            self.ema = {name: p.detach().clone() for name, p in self.stage.model.named_parameters()}
            self.stage.model.load_state_dict({**self.stage.model.state_dict(), **state["raw"]})
        self.optimizer.load_state_dict(state["optimizer"])
        if self.accelerator.scaler is not None and "scaler" in state:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.loader.bad = dict(state.get("bad_samples", {}))
        self.step = int(state["step"])

    def save(self) -> None:
        """Writes a checkpoint of the present step (main process) and prunes old ones."""
        if self.accelerator.is_main_process:
            state: dict[str, Any] = {
                "step": self.step,
                "optimizer": self.optimizer.state_dict(),
                "bad_samples": self.loader.bad,
            }
            if self.accelerator.scaler is not None:
                state["scaler"] = self.accelerator.scaler.state_dict()
            weights = dict(self.stage.model.state_dict())
            if self.ema is not None:
                state["raw"] = {name: p.detach().cpu() for name, p in self.stage.model.named_parameters()}
                weights |= self.ema
            ckpt.save_checkpoint(self.out, self.step, config=dump_yaml(self.run), weights=weights, state=state)
            ckpt.prune(self.out, self.train.keep)
        processes.wait()

    # --- evaluation --------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[nn.Module]:
        """The model to evaluate and save: its weights are the EMA's inside, if there is one."""
        model = self.stage.model
        raw = {name: p.detach().clone() for name, p in model.named_parameters()} if self.ema is not None else {}
        model.load_state_dict({**model.state_dict(), **(self.ema or {})})
        was_training = model.training
        try:
            yield model.eval()
        finally:
            model.load_state_dict({**model.state_dict(), **raw})
            model.train(was_training)

    def evaluate(self, progress: Progress, *, final: bool) -> None:
        """The real metric, a picture, and the best checkpoint on record. A checkpoint of this step must exist."""
        start = time.perf_counter()
        task = self.stage.task
        with self.averaged_weights() as model:
            figures = self.stage.evaluate(model, None if final else self.train.eval_limit, self.device)
            panel = self.stage.panel(model, self.device) if self.accelerator.is_main_process else None
        if self.accelerator.is_main_process:
            assert panel is not None
            (self.out / "panels").mkdir(exist_ok=True)
            Image.fromarray(panel).save(self.out / "panels" / f"{ckpt.step_name(self.step)}.png")
            value, best = figures[task.main_metric], ckpt.read_best(self.out)
            better = best is None or (value < best["value"]) == task.smaller_is_better and value != best["value"]
            if better:
                ckpt.write_best(self.out, self.step, task.main_metric, value)
        progress.evaluated(self.step, figures, panel, time.perf_counter() - start)
