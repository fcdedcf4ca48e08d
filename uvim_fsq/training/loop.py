"""The training loop of both stages. Independent of tasks.

Resuming is exact: the data order is a pure function of (seed, step), and every step seeds the random number generator,
so that no generator state has to be saved.
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
from uvim_fsq.checkpoints.identity import flatten
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

#: After this many steps, training fails if all losses were exactly 0, i.e. if no label counted.
LABEL_CHECK_STEPS = 10


def fit(stage: Stage, run: Run) -> Path:
    """Trains a stage to the end of its schedule and returns the run directory.

    Raises UserError for a non-finite loss (naming the step), unreadable data, loader processes that die, or a full
    disk. Raises `Interrupted` after SIGINT or SIGTERM, with everything saved.
    """
    trainer = Trainer(stage, run)
    with _locked(trainer.out):
        trainer.resume()
        if processes.is_main():
            trainer.write_run_files()
        processes.wait()
        unevaluated = trainer.lacks_evaluation()
        _print_start(trainer)
        progress = Progress(
            run.train,
            stage.name,
            trainer.total,
            trainer.step,
            main=processes.is_main(),
            peak_rate=_peak_rate(trainer),
            unevaluated=unevaluated,
            settings=flatten(run),
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
def _locked(run_dir: Path) -> Iterator[None]:
    """Holds the lock of the run directory in the main process. Removes what a killed process left behind."""
    if processes.is_main():
        refuse_links(run_dir)
    with run_lock(run_dir) if processes.is_main() else contextlib.nullcontext():
        if processes.is_main():
            ckpt.clean_leftovers(run_dir)
        processes.wait()
        yield


def _print_start(trainer: Trainer) -> None:
    train, count = trainer.train, trainer.accelerator.num_processes
    parameters = sum(p.numel() for p in trainer.stage.model.parameters()) / 1e6
    micro = train.batch_size / (train.accumulate * count)
    say(
        f"training on {device_name(trainer.device)}: {parameters:.2f} M parameters, "
        f"{trainer.loader.plan.count} samples, "
        f"batch {train.batch_size} = {micro:g} x {train.accumulate} x {count} (micro x accumulate x processes), "
        f"step {trainer.step} of {trainer.total}, into {trainer.out}"
    )


def _peak_rate(trainer: Trainer) -> float:
    """Training images/s of all processes' devices if they ran at the rate of a large matrix product."""
    # On most CPUs, bf16 and fp16 products are no faster than float32, so the rate in float32 is the reference there.
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
            if trainer.step <= LABEL_CHECK_STEPS:
                early.append(window[-1].get("reconstruction", window[-1]["loss"]))
                if trainer.step in (LABEL_CHECK_STEPS, trainer.total):
                    _refuse_zero_losses(trainer, torch.stack(early))
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
            # The other processes wait here while the main process draws the panel.
            processes.wait()
    except (Interrupted, RuntimeError):
        # If the signal ends another process first, waiting for it fails with a lost connection.
        if signals.number is None:
            raise
        raise _stopped(progress, signals, f"during the evaluation of step {trainer.step}") from None
    # Only after the evaluation, because until then the best checkpoint is not known.
    trainer.tidy()


def _stopped(progress: Progress, signals: StopSignals, when: str) -> Interrupted:
    """Prints that training was stopped, and returns the exception. Other processes may have received the signal."""
    number = signals.number or signal.SIGTERM
    progress.say(f"stopped by signal {int(number)} {when}; saved. Continue with the same command and train.resume=auto")
    return Interrupted(128 + number)


def _reduced(trainer: Trainer, values: torch.Tensor) -> torch.Tensor:
    """The mean over all processes."""
    result = trainer.accelerator.reduce(values, "mean")
    assert isinstance(result, torch.Tensor)
    return result


def _refuse_zero_losses(trainer: Trainer, losses: torch.Tensor) -> None:
    """Raises UserError if all losses of the first steps are 0, which happens only if no pixel has a valid label."""
    if not bool(_reduced(trainer, losses).any()):
        raise UserError(
            f"the loss of the first {len(losses)} steps is exactly 0: no pixel has a label that counts. Look at the "
            "data with `uvim-fsq data check`, and at the task's settings (a wrong scale makes every pixel invalid)"
        )


def _log_window(trainer: Trainer, progress: Progress, window: list[dict[str, torch.Tensor]]) -> None:
    """Logs means over the steps since the last line and over processes. Raises UserError for a non-finite loss."""
    losses = torch.stack([logs["loss"] for logs in window])
    names = sorted(window[-1])
    means = torch.stack([torch.stack([logs[name].to(trainer.device) for logs in window]).mean() for name in names])
    losses, means = _reduced(trainer, losses), _reduced(trainer, means)
    _check_finite(trainer, losses, len(window), "loss")
    # With fp16, the gradient scaler skips steps with non-finite gradients.
    if "grad_norm" in window[-1] and trainer.accelerator.scaler is None:
        norms = torch.stack([logs["grad_norm"].to(trainer.device) for logs in window])
        _check_finite(trainer, norms, len(window), "gradient norm")
    values = dict(zip(names, means.tolist(), strict=True))
    rate = learning_rate(trainer.step - 1, trainer.total, trainer.run.optim)
    ordered = {"loss": values.pop("loss"), "lr": rate, **values}
    if trainer.loader.bad:
        ordered["bad_samples"] = float(len(trainer.loader.bad))
    progress.log(trainer.step, ordered)


def _check_finite(trainer: Trainer, values: torch.Tensor, steps: int, what: str) -> None:
    """Raises UserError, naming the step, if a value of the last `steps` steps is not finite."""
    finite = torch.isfinite(values)
    if not bool(finite.all()):
        first = trainer.step - steps + 1 + int(np.argmin(finite.cpu().numpy()))
        raise UserError(f"the {what} is not finite at step {first}; {trainer.last_good()}")
