"""Speed of the training step of both stages, measured with the training loop's own step."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from uvim_fsq.benchmark.baseline import baseline_step
from uvim_fsq.benchmark.setup import Sizes, fresh_oracle, synthetic_batch
from uvim_fsq.config.schema import Run
from uvim_fsq.data.loader import TrainLoader
from uvim_fsq.data.sample import Batch
from uvim_fsq.errors import UserError
from uvim_fsq.lm.autoregressive import AutoregressiveLM
from uvim_fsq.performance.device_peak import DevicePeak
from uvim_fsq.performance.timing import Measurement, Timing, rate, time_built, time_repeats
from uvim_fsq.tasks.base import Task
from uvim_fsq.training.stages import LMStage, OracleStage, Stage
from uvim_fsq.training.step import Stepper


def stage_of(sizes: Sizes) -> Stage:
    """The stage that a configuration trains, with random weights."""
    if sizes.lm is None:
        return OracleStage(sizes.oracle)
    return LMStage(sizes.lm, fresh_oracle(sizes))


def stepper_of(stage: Stage, run: Run, batch_size: int) -> Stepper:
    """The training loop's step for a stage, without gradient accumulation."""
    train = replace(run.train, batch_size=batch_size, accumulate=1, steps=1000, epochs=None)
    return Stepper(stage, replace(run, train=train), total=1000)


def steps(stepper: Stepper, batches: Iterator[Batch]) -> Callable[[], object]:
    """A function that makes one optimizer step per call."""
    return lambda: stepper.optimizer_step(batches, lambda seconds: None)


def fed_batches(run: Run, task: Task, batch_size: int) -> Iterator[Batch] | None:
    """Batches of the training loader; None if `data.root` holds no data."""
    try:
        source = task.source(run.data.root, run.data.train_split)
    except UserError:
        return None
    loader = TrainLoader(source, task, run.data, batch_size=batch_size, seed=run.train.seed)
    return loader.batches(0, 2**31)


def has_baseline(stage: Stage) -> bool:
    """Whether the baseline code covers a stage: FSQ, and the autoregressive LM with a plain ViT at the image size."""
    if isinstance(stage, OracleStage):
        return stage.oracle.config.quantizer.kind == "fsq"
    lm = stage.lm if isinstance(stage, LMStage) else None
    return isinstance(lm, AutoregressiveLM) and lm.encoder.size == lm.image_size and lm.encoder.vit_size() is not None


def measure_training(
    sizes: Sizes, peak: DevicePeak, device: torch.device, *, batch_size: int, repeats: int
) -> list[Measurement]:
    """Times training steps on a batch that is already on the device.

    If the data are available, steps fed by the loader are timed too. Without `train.compile`, the baseline code for the
    same computation is also timed; it always uses AdamW. On a GPU each repeat consists of several steps, so that the
    host can run ahead as it does in training.
    """
    stage, run = stage_of(sizes), sizes.run
    batch = synthetic_batch(stage.task, run.data.image_size, batch_size, device)
    at_once = 5 if device.type == "cuda" else 1

    def several(step: Callable[[], object]) -> Callable[[], object]:
        return lambda: [step() for _ in range(at_once)]

    def build_baseline() -> Callable[[], object]:
        oracle = stage.oracle.to(device) if isinstance(stage, LMStage) else None
        return several(baseline_step(run, stage.task, oracle, batch, device))

    @functools.cache  # built on first use: the baseline runs first and has the device memory to itself
    def stepper() -> Stepper:
        return stepper_of(stage, run, batch_size)

    def build_ours() -> Callable[[], object]:
        return several(steps(stepper(), itertools.repeat(batch)))

    builders = {", baseline code": build_baseline} if has_baseline(stage) and not run.train.compile else {}
    timings = time_built({**builders, "": build_ours}, device, warmup=3, repeats=repeats)
    fed = fed_batches(run, stage.task, batch_size)
    if fed is not None:
        # The warm-up uses up the batches that the workers have prefetched.
        warmup = -(-(2 * run.data.workers + 3) // at_once)
        step = several(steps(stepper(), fed))
        title = f", fed by {run.data.workers} workers"
        timings[title] = time_repeats(step, device, warmup=warmup, repeats=repeats)
    name = f"train-{run.stage} {sizes.oracle.task.name}, batch {batch_size}"
    flops = stage.train_flops()
    # Sorted, "" comes first, which is ours.
    return [training_line(name + t, timings[t], at_once * batch_size, flops, peak) for t in sorted(timings)]


def training_line(name: str, timing: Timing, images: int, flops: float, peak: DevicePeak) -> Measurement:
    """Images/s and their roofline limit, with TFLOP/s and the fraction of the datasheet's rate (MFU)."""
    achieved = images / timing.median * flops
    other: dict[str, float] = {"TFLOP/s": achieved / 1e12}
    if peak.datasheet:
        other["MFU, datasheet"] = achieved / peak.datasheet
    return rate(name, timing, images, roofline=peak.flops / flops, other=other)
