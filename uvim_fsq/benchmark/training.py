"""How fast the steps of both stages are, by the training loop's own step on a batch that lies on the device."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from uvim_fsq.benchmark.baseline import baseline_step
from uvim_fsq.benchmark.setup import Sizes, fresh_oracle, made_up_batch
from uvim_fsq.config.schema import LMRun, Run
from uvim_fsq.data.loader import TrainLoader
from uvim_fsq.data.sample import Batch
from uvim_fsq.errors import UserError
from uvim_fsq.performance.device_peak import DevicePeak
from uvim_fsq.performance.timing import Measurement, Timing, rate, time_made, time_repeats
from uvim_fsq.tasks.base import Task
from uvim_fsq.training.stages import LMStage, OracleStage, Stage
from uvim_fsq.training.step import Stepper


def stage_of(sizes: Sizes) -> Stage:
    """The stage that a configuration trains, weights random."""
    if sizes.lm is None:
        return OracleStage(sizes.oracle)
    return LMStage(sizes.lm, fresh_oracle(sizes))


def stepper_of(stage: Stage, run: Run, batch_size: int) -> Stepper:
    """That stage under the training loop's step, without accumulation."""
    train = replace(run.train, batch_size=batch_size, accumulate=1, steps=1000, epochs=None)
    return Stepper(stage, replace(run, train=train), total=1000)


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
    sizes: Sizes, ceilings: DevicePeak, device: torch.device, *, batch_size: int, repeats: int
) -> list[Measurement]:
    """Training steps on a batch that lies on the device, beside their floor; where the data are at hand also fed by
    the loader; and, not compiled, the plainest code for the same mathematics (with AdamW, whatever the optimizer is).

    On a GPU each repeat is several steps, so that the host may run ahead as it does in training.
    """
    stage, run = stage_of(sizes), sizes.run
    batch = made_up_batch(stage.task, run.data.image_size, batch_size, device)
    at_once = 5 if device.type == "cuda" else 1

    def several(step: Callable[[], object]) -> Callable[[], object]:
        return lambda: [step() for _ in range(at_once)]

    def plain() -> Callable[[], object]:
        oracle = stage.oracle.to(device) if isinstance(stage, LMStage) else None
        return several(baseline_step(run, stage.task, oracle, batch, device))

    @functools.cache  # not made before it is asked for: the plain code comes first and has the memory for itself
    def stepper() -> Stepper:
        return stepper_of(stage, run, batch_size)

    def ours() -> Callable[[], object]:
        return several(steps(stepper(), itertools.repeat(batch)))

    has_baseline = run.model.kind == "autoregressive" if isinstance(run, LMRun) else run.model.quantizer.kind == "fsq"
    ways = {", plain code": plain, "": ours} if has_baseline and not run.train.compile else {"": ours}
    timings = time_made(ways, device, warmup=3, repeats=repeats)
    fed = fed_batches(run, stage.task, batch_size)
    if fed is not None:
        # What its processes have made beforehand is used up first.
        beforehand = -(-(2 * run.data.workers + 3) // at_once)
        step = several(steps(stepper(), fed))
        title = f", fed by {run.data.workers} workers"
        timings[title] = time_repeats(step, device, warmup=beforehand, repeats=repeats)
    name = f"train-{run.stage} {sizes.oracle.task.name}, batch {batch_size}"
    flops = stage.train_flops()
    # "" is the shortest: ours comes first.
    return [training_line(name + t, timings[t], at_once * batch_size, flops, ceilings) for t in sorted(timings)]


def training_line(name: str, timing: Timing, images: int, flops: float, ceilings: DevicePeak) -> Measurement:
    """Images/s beside the floor, with TFLOP/s and the share of the maker's figure."""
    achieved = images / timing.median * flops
    further: dict[str, float] = {"TFLOP/s": achieved / 1e12}
    if ceilings.datasheet:
        further["MFU of the datasheet"] = achieved / ceilings.datasheet
    return rate(name, timing, images, floor=ceilings.flops / flops, further=further)
