"""How fast the steps of both stages are, by the training loop's own step on a batch that lies on the device."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from uvim_fsq.benchmark.ceilings import Ceilings
from uvim_fsq.benchmark.measure import Measurement, Timing, rate, time_ways
from uvim_fsq.benchmark.plain import plain_step
from uvim_fsq.benchmark.setup import Sizes, fresh_oracle, made_up_batch
from uvim_fsq.config import Run
from uvim_fsq.data.loader import TrainLoader
from uvim_fsq.data.sample import Batch
from uvim_fsq.errors import UserError
from uvim_fsq.tasks.base import Task
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


def fed_batches(run: Run, task: Task, batch_size: int) -> Iterator[Batch] | None:
    """Training's own loader, from its first batch on; None where `data.root` holds no data."""
    try:
        source = task.source(run.data.root, run.data.train_split)
    except UserError:
        return None
    loader = TrainLoader(source, task, run.data, batch_size=batch_size, seed=run.train.seed)
    return loader.batches(0, 2**31)


def measure_training(
    sizes: Sizes, ceilings: Ceilings, device: torch.device, *, batch_size: int, repeats: int
) -> list[Measurement]:
    """Training steps on a batch that lies on the device, beside their floor; where the data are at hand also fed by
    the loader; and, not compiled, the plainest code for the same mathematics (with AdamW, whatever the optimizer is).

    On a GPU each repeat is several steps, so that the host may run ahead as it does in training.
    """
    stepper = stepper_of(sizes, batch_size)
    task, run = stepper.stage.task, sizes.run
    batch = made_up_batch(task, run.data.image_size, batch_size, device)
    at_once = 5 if device.type == "cuda" else 1

    def several(step: Callable[[], object]) -> Callable[[], object]:
        return lambda: [step() for _ in range(at_once)]

    ways = {"": several(steps(stepper, itertools.repeat(batch)))}
    fed = fed_batches(run, task, batch_size)
    if fed is not None:
        ways[f", fed by {run.data.workers} workers"] = several(steps(stepper, fed))
    if not run.train.compile:
        oracle = stepper.stage.oracle if isinstance(stepper.stage, LMStage) else None
        ways[", plain code"] = several(plain_step(run, task, oracle, batch, device))
    timings = time_ways(ways, device, warmup=3, repeats=repeats)
    name = f"train-{run.stage} {sizes.oracle.task.name}, batch {batch_size}"
    flops = stepper.stage.train_flops()
    return [training_line(name + way, t, at_once * batch_size, flops, ceilings) for way, t in timings.items()]


def training_line(name: str, timing: Timing, images: int, flops: float, ceilings: Ceilings) -> Measurement:
    """Images/s beside the floor, with TFLOP/s and the share of the maker's figure."""
    achieved = images / timing.median * flops
    further: dict[str, float] = {"TFLOP/s": achieved / 1e12}
    if ceilings.datasheet:
        further["MFU of the datasheet"] = achieved / ceilings.datasheet
    return rate(name, timing, images, floor=ceilings.flops / flops, further=further)
