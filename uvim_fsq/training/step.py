"""The optimizer step of either stage, and the configuration of Accelerate. Independent of tasks and data sets."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from uvim_fsq import processes
from uvim_fsq.compilation import compiled
from uvim_fsq.config.schema import Run, TrainConfig
from uvim_fsq.data.batch import to_device
from uvim_fsq.data.loader import derive_seed
from uvim_fsq.data.sample import Batch
from uvim_fsq.training.optim import schedule, set_rates
from uvim_fsq.training.stages import MAIN, Stage

PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


def make_accelerator(train: TrainConfig) -> Accelerator:
    """Builds the Accelerator for the given training settings."""
    processes.state()
    # A process may train several stages one after the other, with different precisions. The process group is kept.
    AcceleratorState._reset_state()
    return Accelerator(
        mixed_precision=PRECISION[train.precision],
        # A plugin, because an environment variable would override a plain integer. The end of a loader must not trigger
        # an optimizer step.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=train.accumulate, sync_with_dataloader=False),
    )


class Stepper:
    """A stage's model and optimizers under Accelerate, and the number of steps taken.

    Attributes:
        total: length of the learning rate schedule in steps.
        model: the model, compiled if configured, and wrapped by Accelerate.
        auxiliary: name -> wrapped auxiliary module.
        optimizers: name -> wrapped optimizer, that of the model first.
        ema: parameter name -> exponential moving average, or None.
        step: optimizer steps taken.
    """

    def __init__(self, stage: Stage, run: Run, total: int) -> None:
        self.stage, self.run, self.train, self.total = stage, run, run.train, total
        self.accelerator = make_accelerator(run.train)
        self.device = self.accelerator.device
        optimizers = stage.build_optimizers()
        modules = [stage.model, *stage.auxiliary.values()]
        # In the order of the modules, not of the optimizers' groups, because the rounding of the norm depends on it.
        in_order = [p for module in modules for p in module.parameters()]
        owned = {name: {id(p) for group in o.param_groups for p in group["params"]} for name, o in optimizers.items()}
        self._parameters = {name: [p for p in in_order if id(p) in ids] for name, ids in owned.items()}
        model = compiled(stage.model) if run.train.compile else stage.model
        # The schedule is not passed to Accelerate, which would step it once per process.
        self.model = self._prepared(model)
        self.auxiliary = {name: self._prepared(module) for name, module in stage.auxiliary.items()}
        self.optimizers = {name: self.accelerator.prepare(optimizer) for name, optimizer in optimizers.items()}
        self.ema = self.ema_start() if run.train.ema is not None else None
        self.step = 0

    def _prepared(self, module: nn.Module) -> nn.Module:
        """The module on its device, wrapped by Accelerate."""
        # Unless it is told, Accelerate looks for parameters spread over devices, and imports a compiler for that.
        return self.accelerator.prepare(module, device_placement=[True])

    def ema_start(self) -> dict[str, torch.Tensor]:
        """A copy of the current weights, from which averaging starts."""
        return {name: p.detach().to(self.device, copy=True) for name, p in self.stage.model.named_parameters()}

    def optimizer_step(self, batches: Iterator[Batch], waited: Callable[[float], object]) -> dict[str, torch.Tensor]:
        """One optimizer step: forward and backward passes of all micro batches, gradient clipping and update.

        Args:
            batches: yields micro batches.
            waited: called with the seconds spent waiting for each of them.

        Returns scalar tensors on the device: the loss, the logs and the gradient norm.
        """
        rank = self.accelerator.process_index
        for optimizer in self.optimizers.values():
            set_rates(optimizer, self.run.optim.lr, schedule(self.step, self.total, self.run.optim))
        for module in (self.model, *self.auxiliary.values()):
            module.train()
        sums: dict[str, torch.Tensor] = {}
        # If the batch does not divide evenly, micro batches differ by one image. Accelerate averages them with equal
        # weights over accumulation and processes, so each loss is weighted by its share of the batch.
        parts = self.train.accumulate * self.accelerator.num_processes
        for micro in range(self.train.accumulate):
            start = time.perf_counter()
            batch = to_device(next(batches), self.device)
            waited(time.perf_counter() - start)
            # After fetching the batch, because starting the loader draws from the same generator.
            torch.manual_seed(derive_seed(self.train.seed, self.step, rank, micro))
            weight = len(batch["image"]) * parts / self.train.batch_size
            with self.accelerator.accumulate(self.model, *self.auxiliary.values()):
                for key, value in self._backward(batch, weight):
                    sums[key] = sums.get(key, torch.zeros((), device=self.device)) + value.detach().float() * weight
                for name, optimizer in self.optimizers.items():
                    if self.accelerator.sync_gradients and self.run.optim.clip_norm is not None:
                        norm = self._clip(self._parameters[name], self.run.optim.clip_norm)
                        sums[_log_name(name, "grad_norm")] = norm * self.train.accumulate
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
        self.stage.on_optimizer_step(self.sum, derive_seed(self.train.seed, self.step))
        if self.ema is not None:
            assert self.train.ema is not None
            # Updates many tensors with one kernel.
            average = get_ema_multi_avg_fn(self.train.ema)
            average(list(self.ema.values()), list(self.stage.model.parameters()), self.step)
        self.step += 1
        return {name: value / self.train.accumulate for name, value in sums.items()}

    def _clip(self, parameters: list[nn.Parameter], limit: float) -> torch.Tensor:
        """Clips the norm of the gradients. Returns the norm before."""
        # As Accelerate's function for whole parameters, which would look for spread ones and import a compiler.
        self.accelerator.unscale_gradients()
        return nn.utils.clip_grad_norm_(parameters, limit)

    def _backward(self, batch: Batch, weight: float) -> Iterator[tuple[str, torch.Tensor]]:
        """Backpropagates each loss of a micro batch into the parameters of its optimizer. Yields losses and logs."""
        losses = self.stage.steps(self.model, self.auxiliary, batch)
        several = len(self.optimizers) > 1
        while True:
            with self.accelerator.autocast():
                found = next(losses, None)
            if found is None:
                return
            name, loss, logs = found
            inputs = {"inputs": self._parameters[name]} if several else {}
            self.accelerator.backward(loss * weight, **inputs)
            yield _log_name(name, "loss"), loss
            yield from logs.items()

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sums a tensor over all processes."""
        total = self.accelerator.reduce(values, "sum")
        assert isinstance(total, torch.Tensor)
        return total


def _log_name(optimizer: str, name: str) -> str:
    return name if optimizer == MAIN else f"{optimizer}_{name}"
