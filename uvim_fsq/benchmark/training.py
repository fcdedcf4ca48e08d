"""How fast the steps of both stages are, by the training loop's own step on a batch that lies on the device."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from uvim_fsq.benchmark.ceilings import Ceilings
from uvim_fsq.benchmark.measure import Measurement, Timing, rate, time_repeats
from uvim_fsq.benchmark.setup import Sizes, fresh_oracle, made_up_batch
from uvim_fsq.data.sample import Batch
from uvim_fsq.training.stages import LMStage, OracleStage, Stage
from uvim_fsq.training.step import Stepper


def stage_of(sizes: Sizes) -> Stage:
    """The stage that a configuration trains, weights random."""
    if sizes.lm is None:
        return OracleStage(sizes.oracle)
    return LMStage(sizes.lm, fresh_oracle(sizes))


def stepper_of(sizes: Sizes, batch_size: int) -> Stepper:
    """That stage under the training loop's step, without accumulation."""
    run = sizes.run
    train = replace(run.train, batch_size=batch_size, accumulate=1, steps=1000, epochs=None)
    run = replace(run, train=train)
    return Stepper(stage_of(replace(sizes, lm=run) if sizes.lm else replace(sizes, oracle=run)), run, total=1000)


def steps(stepper: Stepper, batches: Iterator[Batch]) -> Callable[[], object]:
    """One optimizer step at each call."""
    return lambda: stepper.optimizer_step(batches, lambda seconds: None)


def measure_training(
    sizes: Sizes, ceilings: Ceilings, device: torch.device, *, batch_size: int, repeats: int, plain: bool = True
) -> list[Measurement]:
    """Training steps on a batch that lies on the device, beside their floor and the plainest code for the same.

    On a GPU each repeat is several steps, so that the host may run ahead as it does in training.
    """
    stepper = stepper_of(sizes, batch_size)
    batch = made_up_batch(stepper.stage.task, sizes.run.data.image_size, batch_size, device)
    one = steps(stepper, itertools.repeat(batch))
    at_once = 5 if device.type == "cuda" else 1

    def several() -> None:
        for _ in range(at_once):
            one()

    timing = time_repeats(several, device, warmup=3, repeats=repeats)
    flops = stepper.stage.train_flops()
    name = f"train-{sizes.run.stage} {sizes.oracle.task.name}, batch {batch_size}"
    return [training_line(name, timing, at_once * batch_size, flops, ceilings)]


def training_line(name: str, timing: Timing, images: int, flops: float, ceilings: Ceilings) -> Measurement:
    """Images/s beside the floor, with TFLOP/s and the share of the maker's figure."""
    achieved = images / timing.median * flops
    further: dict[str, float] = {"TFLOP/s": achieved / 1e12}
    if ceilings.datasheet:
        further["MFU of the datasheet"] = achieved / ceilings.datasheet
    return rate(name, timing, images, floor=ceilings.flops / flops, further=further)
