"""The one training loop, for both stages. It knows no task.

Resume is exact: the data order is a pure function of (seed, step), and every step seeds its own random numbers, so
that no generator state has to travel.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from uvim_fsq import processes
from uvim_fsq.checkpoints import files as ckpt
from uvim_fsq.config.schema import Run
from uvim_fsq.console import say
from uvim_fsq.data.loader import worker_errors
from uvim_fsq.errors import UserError
from uvim_fsq.files import refuse_links
from uvim_fsq.performance.device_peak import device_name, matrix_rate
from uvim_fsq.training.lock import run_lock
from uvim_fsq.training.optim import learning_rate
from uvim_fsq.training.progress import Progress
from uvim_fsq.training.signals import Interrupted, StopSignals
from uvim_fsq.training.stages import Stage
from uvim_fsq.training.trainer import Trainer

#: After so many steps it is certain whether any label counts.
EARLY = 10


def fit(stage: Stage, run: Run) -> Path:
    """Trains a stage to the end of its schedule and returns the run directory.

    Raises UserError for a non-finite loss (naming the step), unreadable data, loader processes that die, or a disk that
    is full; `Interrupted` after SIGINT or SIGTERM, with everything saved.
    """
    trainer = Trainer(stage, run)
    with _alone(trainer.out):
        trainer.resume()
        if processes.is_main():
            trainer.write_run_files()
        processes.wait()
        unevaluated = trainer.lacks_evaluation()
        _say_start(trainer)
        progress = Progress(
            run.train,
            stage.name,
            trainer.total,
            trainer.step,
            main=processes.is_main(),
            ceiling=_ceiling(trainer),
            unevaluated=unevaluated,
        )
        try:
            with StopSignals() as signals, worker_errors():
                if unevaluated:
                    _evaluate(trainer, progress, signals)
                _train(trainer, progress, signals)
        finally:
            progress.close()
    return trainer.out


@contextlib.contextmanager
def _alone(run_dir: Path) -> Iterator[None]:
    """Holds the run directory's lock in the main process; what a killed process left behind is removed."""
    if processes.is_main():
        refuse_links(run_dir)
    with run_lock(run_dir) if processes.is_main() else contextlib.nullcontext():
        if processes.is_main():
            ckpt.clean_leftovers(run_dir)
        processes.wait()
        yield


def _say_start(trainer: Trainer) -> None:
    train, count = trainer.train, trainer.accelerator.num_processes
    parameters = sum(p.numel() for p in trainer.stage.model.parameters()) / 1e6
    micro = train.batch_size / (train.accumulate * count)
    say(
        f"training on {device_name(trainer.device)}: {parameters:.2f} M parameters, "
        f"{trainer.loader.plan.count} samples, "
        f"batch {train.batch_size} = {micro:g} x {train.accumulate} x {count} (micro x accumulate x processes), "
        f"step {trainer.step} of {trainer.total}, into {trainer.out}"
    )


def _ceiling(trainer: Trainer) -> float:
    """Images/s of all processes' devices at the rate of a large matrix product."""
    # bf16 and fp16 products are no quicker than float32's on most CPUs; on a GPU they are what training is made of.
    precision = trainer.train.precision if trainer.device.type == "cuda" else "fp32"
    rate = matrix_rate(trainer.device, precision) * trainer.accelerator.num_processes
    return rate / trainer.stage.train_flops()


def _train(trainer: Trainer, progress: Progress, signals: StopSignals) -> None:
    train = trainer.train
    agreement = processes.Agreement()
    window: list[dict[str, torch.Tensor]] = []
    early: list[torch.Tensor] = []
    with contextlib.closing(trainer.loader.batches(trainer.step, trainer.total)) as batches:
        while trainer.step < trainer.total:
            window.append(trainer.stepper.optimizer_step(batches, progress.waited))
            progress.stepped(trainer.step)
            if trainer.step <= EARLY:
                early.append(window[-1].get("reconstruction", window[-1]["loss"]))
                if trainer.step in (EARLY, trainer.total):
                    _refuse_empty(trainer, torch.stack(early))
            stop, news = agreement.ask(signals.number is not None, trainer.loader.news)
            if news:
                trainer.loader.merge_bad(processes.gather(trainer.loader.bad))
            evaluate = trainer.evaluates_now()
            save = stop or evaluate or (train.save_every is not None and trainer.step % train.save_every == 0)
            if save or trainer.step % train.log_every == 0:
                _log_window(trainer, progress, window)
                window = []
            if save:
                trainer.save()
            if save and not evaluate:
                trainer.tidy()
            if stop:
                raise _stopped(progress, signals, f"after step {trainer.step}")
            if evaluate:
                _evaluate(trainer, progress, signals)


def _evaluate(trainer: Trainer, progress: Progress, signals: StopSignals) -> None:
    try:
        with signals.at_once():
            trainer.evaluate(progress)
            # The main process draws pictures meanwhile.
            processes.wait()
    except (Interrupted, RuntimeError):
        # Who waits for a process that the signal has ended first finds a lost connection.
        if signals.number is None:
            raise
        raise _stopped(progress, signals, f"during the evaluation of step {trainer.step}") from None
    # Not before the newest is evaluated: until then the best is not known.
    trainer.tidy()


def _stopped(progress: Progress, signals: StopSignals, when: str) -> Interrupted:
    """Says so. In another process the signal may have come first, or alone."""
    number = signals.number or signal.SIGTERM
    progress.say(f"stopped by signal {int(number)} {when}; saved. Continue with the same command and train.resume=auto")
    return Interrupted(128 + number)


def _reduced(trainer: Trainer, values: torch.Tensor) -> torch.Tensor:
    """The mean over processes."""
    result = trainer.accelerator.reduce(values, "mean")
    assert isinstance(result, torch.Tensor)
    return result


def _refuse_empty(trainer: Trainer, losses: torch.Tensor) -> None:
    """Of the first steps: no loss begins at 0, unless there is nothing to learn from."""
    if not bool(_reduced(trainer, losses).any()):
        raise UserError(
            f"the loss of the first {len(losses)} steps is exactly 0: no pixel has a label that counts. Look at the "
            "data with `uvim-fsq data check`, and at the task's settings (a wrong scale makes every pixel invalid)"
        )


def _log_window(trainer: Trainer, progress: Progress, window: list[dict[str, torch.Tensor]]) -> None:
    """Means over the steps since the last line and over processes; stops at the first non-finite loss."""
    losses = torch.stack([logs["loss"] for logs in window])
    names = sorted(window[-1])
    means = torch.stack([torch.stack([logs[name].to(trainer.device) for logs in window]).mean() for name in names])
    losses, means = _reduced(trainer, losses), _reduced(trainer, means)
    _stop_at(trainer, losses, len(window), "loss")
    # fp16's scaler leaves out steps whose gradient is not finite.
    if "grad_norm" in window[-1] and trainer.accelerator.scaler is None:
        norms = torch.stack([logs["grad_norm"].to(trainer.device) for logs in window])
        _stop_at(trainer, norms, len(window), "gradient's norm")
    values = dict(zip(names, means.tolist(), strict=True))
    rate = learning_rate(trainer.step - 1, trainer.total, trainer.run.optim)
    ordered = {"loss": values.pop("loss"), "lr": rate, **values}
    if trainer.loader.bad:
        ordered["bad_samples"] = float(len(trainer.loader.bad))
    progress.log(trainer.step, ordered)


def _stop_at(trainer: Trainer, values: torch.Tensor, steps: int, what: str) -> None:
    """Raises UserError, naming the step, if one of the values of the last `steps` steps is not finite."""
    finite = torch.isfinite(values)
    if not bool(finite.all()):
        first = trainer.step - steps + 1 + int(np.argmin(finite.cpu().numpy()))
        raise UserError(f"the {what} is not finite at step {first}; {trainer.last_good()}")
