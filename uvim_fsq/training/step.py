"""One optimizer step of either stage, and the one place that configures Accelerate. It knows no task and no data."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin
from torch.optim.swa_utils import get_ema_multi_avg_fn

from uvim_fsq import processes
from uvim_fsq.compilation import compiled
from uvim_fsq.config import Run, TrainConfig
from uvim_fsq.data.loader import mix
from uvim_fsq.data.sample import Batch
from uvim_fsq.evaluation import to_device
from uvim_fsq.training.optim import build_optimizer, schedule, set_rates
from uvim_fsq.training.stages import Stage

PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


def make_accelerator(train: TrainConfig) -> Accelerator:
    """Accelerate as this project uses it."""
    processes.state()
    # A process may train several stages in turn, each in its own precision; the process group stays.
    AcceleratorState._reset_state()
    return Accelerator(
        mixed_precision=PRECISION[train.precision],
        # An object, not the plain integer, which loses to an environment variable; the end of a loader means nothing.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=train.accumulate, sync_with_dataloader=False),
    )


class Stepper:
    """A stage's model and optimizer under Accelerate, and the number of steps they have taken.

    `total` is the length of the learning rate's schedule.
    """

    def __init__(self, stage: Stage, run: Run, total: int) -> None:
        self.stage, self.run, self.train, self.total = stage, run, run.train, total
        self.accelerator = make_accelerator(run.train)
        self.device = self.accelerator.device
        optimizer = build_optimizer(stage.model, run.optim, run.stage)
        model = compiled(stage.model) if run.train.compile else stage.model
        # The schedule is not prepared: it would step once per process.
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.ema = self._ema_start() if run.train.ema is not None else None
        self.step = 0

    def _ema_start(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().to(self.device, copy=True) for name, p in self.stage.model.named_parameters()}

    def optimizer_step(self, batches: Iterator[Batch], waited: Callable[[float], object]) -> dict[str, torch.Tensor]:
        """Micro batches, backward, clip, update. Returns device tensors: loss, logs and gradient norm.

        `waited` is told the seconds that each batch had to be waited for.
        """
        rank = self.accelerator.process_index
        set_rates(self.optimizer, self.run.optim.lr, schedule(self.step, self.total, self.run.optim))
        self.model.train()
        sums: dict[str, torch.Tensor] = {}
        # Micro batches differ by one image where the batch does not divide evenly. Accelerate averages them as equals
        # over accumulation and processes, so each is weighted by its share of the batch.
        parts = self.train.accumulate * self.accelerator.num_processes
        for micro in range(self.train.accumulate):
            start = time.perf_counter()
            batch = to_device(next(batches), self.device)
            waited(time.perf_counter() - start)
            # After the loader, whose start draws from the same generator.
            torch.manual_seed(mix(self.train.seed, self.step, rank, micro))
            with self.accelerator.accumulate(self.model):
                with self.accelerator.autocast():
                    loss, logs = self.stage.step(self.model, batch)
                weight = len(batch["image"]) * parts / self.train.batch_size
                self.accelerator.backward(loss * weight)
                if self.accelerator.sync_gradients and self.run.optim.clip_norm is not None:
                    norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.run.optim.clip_norm)
                    sums["grad_norm"] = torch.as_tensor(norm) * self.train.accumulate
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
            for name, value in {"loss": loss, **logs}.items():
                sums[name] = sums.get(name, torch.zeros((), device=self.device)) + value.detach().float() * weight
        self.stage.after_step(self._sum, mix(self.train.seed, self.step))
        if self.ema is not None:
            assert self.train.ema is not None
            # One kernel for many tensors, without gradients.
            average = get_ema_multi_avg_fn(self.train.ema)
            average(list(self.ema.values()), list(self.stage.model.parameters()), self.step)
        self.step += 1
        return {name: value / self.train.accumulate for name, value in sums.items()}

    def _sum(self, values: torch.Tensor) -> torch.Tensor:
        total = self.accelerator.reduce(values, "sum")
        assert isinstance(total, torch.Tensor)
        return total
