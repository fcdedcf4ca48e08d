"""The one training loop, for both stages. It knows no task.

Resume is exact: the data order is a pure function of (seed, step), and every step seeds its own random numbers, so
that no generator state has to travel.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from uvim_fsq.benchmark.ceilings import matrix_rate
from uvim_fsq.config import Run
from uvim_fsq.config_io import dump_yaml
from uvim_fsq.data.loader import TrainLoader
from uvim_fsq.errors import UserError
from uvim_fsq.identity import check_resume
from uvim_fsq.models import read_config
from uvim_fsq.training import checkpoint as ckpt
from uvim_fsq.training.optim import learning_rate
from uvim_fsq.training.progress import Progress
from uvim_fsq.training.stages import Stage
from uvim_fsq.training.step import Stepper


class Interrupted(SystemExit):
    """Training ended early on a signal, after saving; the exit code is 128 + the signal's number."""


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM instead of dying in the middle of a step; a second SIGINT acts at once."""
    received: list[int] = []

    def handler(number: int, _frame: Any) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, old in before.items():
            signal.signal(number, old)


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
        self.loader.bad = list(state.get("bad", []))
        self.step = int(state["step"])

    def save(self) -> None:
        """Writes a checkpoint of the present step (main process) and prunes old ones."""
        if self.accelerator.is_main_process:
            state: dict[str, Any] = {
                "step": self.step,
                "optimizer": self.optimizer.state_dict(),
                "bad": self.loader.bad,
            }
            if self.accelerator.scaler is not None:
                state["scaler"] = self.accelerator.scaler.state_dict()
            weights = dict(self.stage.model.state_dict())
            if self.ema is not None:
                state["raw"] = {name: p.detach().cpu() for name, p in self.stage.model.named_parameters()}
                weights |= self.ema
            ckpt.save_checkpoint(self.out, self.step, config=dump_yaml(self.run), weights=weights, state=state)
            ckpt.prune(self.out, self.train.keep)
        self.accelerator.wait_for_everyone()

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


def fit(stage: Stage, run: Run) -> Path:
    """Trains a stage to the end of its schedule and returns the run directory.

    Raises UserError for a non-finite loss (naming the step), unreadable data, or a disk that is full; `Interrupted`
    after SIGINT or SIGTERM, with everything saved.
    """
    trainer = Trainer(stage, run)
    if trainer.accelerator.is_main_process:
        trainer.out.mkdir(parents=True, exist_ok=True)
        ckpt.clean_leftovers(trainer.out)
    trainer.accelerator.wait_for_everyone()
    trainer.resume()
    if trainer.accelerator.is_main_process:
        (trainer.out / "config.yaml").write_text(dump_yaml(run))
        stage.extra_files(trainer.out)
    progress = Progress(
        run.train,
        stage.main_prefix,
        trainer.total,
        trainer.step,
        main=trainer.accelerator.is_main_process,
        ceiling=_ceiling(trainer),
    )
    try:
        with stop_signals() as received:
            _train(trainer, progress, received)
    finally:
        progress.close()
        trainer.accelerator.wait_for_everyone()
    return trainer.out


def _ceiling(trainer: Trainer) -> float:
    """Images/s of all processes' devices at the rate of a large matrix product."""
    # bf16 and fp16 products are no quicker than float32's on most CPUs; on a GPU they are what training is made of.
    precision = trainer.train.precision if trainer.device.type == "cuda" else "fp32"
    rate = matrix_rate(trainer.device, precision) * trainer.accelerator.num_processes
    return rate / trainer.stage.train_flops()


def _train(trainer: Trainer, progress: Progress, received: list[int]) -> None:
    train = trainer.train
    batches = trainer.loader.batches(trainer.step, trainer.total)
    window: list[dict[str, torch.Tensor]] = []
    saved = trainer.step
    while trainer.step < trainer.total:
        window.append(trainer.optimizer_step(batches, progress.waited))
        last = trainer.step == trainer.total
        stop = _agree(trainer, bool(received))
        evaluate = last or (train.eval_every is not None and trainer.step % train.eval_every == 0)
        save = stop or evaluate or (train.save_every is not None and trainer.step % train.save_every == 0)
        if save or trainer.step % train.log_every == 0:
            _log_window(trainer, progress, window)
            window = []
        if save:
            trainer.save()
            saved = trainer.step
        if evaluate:
            trainer.evaluate(progress, final=last)
        if stop and not last:
            progress.say(
                f"stopped by signal {received[0] if received else ''} after step {saved}; saved. "
                f"Continue with the same command and train.resume=auto"
            )
            raise Interrupted(128 + (received[0] if received else signal.SIGTERM))


def _agree(trainer: Trainer, stop: bool) -> bool:
    """Whether any process was told to stop; asked of the others at log steps only, since it synchronises."""
    if trainer.accelerator.num_processes == 1:
        return stop
    if trainer.step % trainer.train.log_every:
        return False
    return bool(_reduced(trainer, torch.tensor([float(stop)], device=trainer.device)).item())


def _reduced(trainer: Trainer, values: torch.Tensor) -> torch.Tensor:
    """The mean over processes."""
    result = trainer.accelerator.reduce(values, "mean")
    assert isinstance(result, torch.Tensor)
    return result


def _log_window(trainer: Trainer, progress: Progress, window: list[dict[str, torch.Tensor]]) -> None:
    """Means over the steps since the last line and over processes; stops at the first non-finite loss."""
    losses = torch.stack([logs["loss"] for logs in window])
    names = sorted(window[-1])
    means = torch.stack([torch.stack([logs[name].to(trainer.device) for logs in window]).mean() for name in names])
    if trainer.accelerator.num_processes > 1:
        losses, means = _reduced(trainer, losses), _reduced(trainer, means)
    finite = torch.isfinite(losses)
    if not bool(finite.all()):
        first = trainer.step - len(window) + 1 + int(np.argmin(finite.cpu().numpy()))
        kept = ckpt.checkpoints(trainer.out)
        remedy = f"the last good checkpoint is {kept[-1]}" if kept else "no checkpoint was written yet"
        raise UserError(
            f"the loss is not finite at step {first}; {remedy}. "
            "Lower optim.lr, lengthen optim.warmup_steps, set optim.clip_norm, or use train.precision=bf16 or fp32"
        )
    values = dict(zip(names, means.tolist(), strict=True))
    rate = learning_rate(trainer.step - 1, trainer.total, trainer.run.optim)
    ordered = {"loss": values.pop("loss"), "lr": rate, **values}
    if trainer.loader.bad:
        ordered["bad_samples"] = float(len(trainer.loader.bad))
    progress.log(trainer.step, ordered)
