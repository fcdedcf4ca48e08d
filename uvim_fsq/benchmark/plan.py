"""What a training needs on given GPUs: micro-batches, memory, time and cost, computed without weights or data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from uvim_fsq.benchmark.memory import direct_memory, lm_memory, oracle_memory
from uvim_fsq.benchmark.setup import Sizes, read_sizes, with_categories
from uvim_fsq.checkpoints.loading import build_oracle, build_task
from uvim_fsq.config.rules import check_warmup, validate
from uvim_fsq.config.schema import DirectRun, LMRun, Run
from uvim_fsq.data.loader import TrainPlan
from uvim_fsq.errors import UserError
from uvim_fsq.performance.device_peak import DATASHEET, DATASHEET_FP32
from uvim_fsq.performance.memory import USABLE, TrainingMemory, smallest_accumulate
from uvim_fsq.tasks.configuration import load_run
from uvim_fsq.training.stages import DirectStage, LMStage, OracleStage, Stage

#: The largest device memory that is taken for a number of GB, not of MB.
MOST_GB = 2000.0


@dataclass(frozen=True)
class Hardware:
    """The devices to plan for.

    Attributes:
        gpus: their number, one process each.
        memory_gb: memory of each, in GB of 10^9 bytes.
        gpu: a key of `DATASHEET`.
        share: share of the datasheet's rate that training is assumed to reach.
        price: price of one GPU for an hour, in any currency; None if unknown.
    """

    gpus: int
    memory_gb: float
    gpu: str = "H100"
    share: float = 0.4
    price: float | None = None

    def __post_init__(self) -> None:
        """Raises UserError for values that no device has."""
        if self.gpus < 1:
            raise UserError(f"--gpus {self.gpus}: give at least 1")
        if self.gpu not in DATASHEET:
            raise UserError(f"--gpu {self.gpu}: no datasheet; known are {', '.join(DATASHEET)}")
        if not 0 < self.memory_gb < math.inf:
            raise UserError(f"--gpu-memory {self.memory_gb:g}: give the memory of one GPU in GB, e.g. 80")
        if self.memory_gb > MOST_GB:
            raise UserError(f"--gpu-memory {self.memory_gb:g}: no GPU has that much; it is in GB, e.g. 80")
        if not 0 < self.share <= 1:
            raise UserError(f"--share-of-peak {self.share:g}: must be above 0 and at most 1, e.g. 0.4")
        if self.price is not None and not 0 <= self.price < math.inf:
            raise UserError(f"--price-per-gpu-hour {self.price:g}: must be a number that is not negative, e.g. 2.5")


@dataclass(frozen=True)
class Work:
    """What a configuration trains, without regard to devices.

    Attributes:
        run: the configuration.
        parameters: trained parameters.
        flops: FLOP per image in the precision of training.
        fp32_flops: FLOP per image that are always float32: the frozen oracle's tokens.
        steps: optimizer steps.
        samples: training images per epoch; None if the configuration counts steps and the data are not there.
        memory: training memory of one process.
    """

    run: Run
    parameters: int
    flops: float
    fp32_flops: float
    steps: int
    samples: int | None
    memory: TrainingMemory

    @property
    def images(self) -> int:
        """Images of the whole training."""
        return self.steps * self.run.train.batch_size


@dataclass(frozen=True)
class Plan:
    """A training on given devices.

    Attributes:
        accumulate: the smallest `train.accumulate` that fits.
        micro_batch: images that a GPU holds at a time, at most.
        bytes: memory of each GPU that training takes.
        images_per_second: of all GPUs together, at the assumed share of the peak.
        hours: time of all steps, without data loading, evaluation and communication.
    """

    work: Work
    hardware: Hardware
    accumulate: int
    micro_batch: int
    bytes: float
    images_per_second: float
    hours: float

    @property
    def gpu_hours(self) -> float:
        return self.hours * self.hardware.gpus


def read_work(
    config: str | Path,
    overrides: Sequence[str],
    *,
    gpus: int = 1,
    oracle: Path | None = None,
    images: int | None = None,
) -> Work:
    """Counts what a configuration of any stage trains in `gpus` processes. Neither weights nor data need to exist.

    Args:
        oracle: configuration of the oracle of an LM; see `read_sizes`.
        images: number of training images; None: of the data, if they are there.

    Raises:
        UserError: the configuration is invalid, or its length is in epochs and the number of images unknown.
    """
    if images is not None and not 1 <= images < 2**62:
        raise UserError(f"--images {images}: give the number of training images")
    with torch.device("meta"):
        stage, memory = _stage(config, overrides, gpus, oracle)
    run = stage.run
    samples = images if images is not None else _count(stage)
    if run.train.steps is not None:
        steps = run.train.steps
    elif samples is None:
        raise UserError(
            f"train.epochs={run.train.epochs:g}, and data.root={run.data.root or '(empty)'} holds no data to count; "
            "give the number of training images with --images"
        )
    else:
        per_epoch = TrainPlan(samples, run.train.batch_size, run.train.seed).steps_per_epoch
        steps = max(1, round((run.train.epochs or 0) * per_epoch))
    check_warmup(run, steps)
    fp32 = stage.oracle.cost().tokenize if isinstance(stage, LMStage) else 0.0
    return Work(
        run=run,
        parameters=sum(p.numel() for p in stage.model.parameters() if p.requires_grad),
        flops=stage.train_flops() - fp32,
        fp32_flops=fp32,
        steps=steps,
        samples=samples,
        memory=memory,
    )


def _stage(
    config: str | Path, overrides: Sequence[str], gpus: int, oracle: Path | None
) -> tuple[Stage, TrainingMemory]:
    """The stage that a configuration trains, and its memory. Call it on the meta device."""
    run = load_run(config, ["train.out=unused", *overrides])
    if isinstance(run, DirectRun):
        validate(run)
        model = replace(run.model, encoder=replace(run.model.encoder, weights="none"))
        direct = DirectStage(with_categories(replace(run, model=model)))
        return direct, direct_memory(direct.direct, direct.run, gpus)
    if isinstance(run, LMRun) and run.decoder_tuning.run:
        raise UserError("plan covers train-oracle, train-lm and train-direct; leave decoder_tuning.run out")
    sizes: Sizes = read_sizes(config, overrides, oracle)
    if sizes.lm is None:
        stage = OracleStage(sizes.oracle)
        return stage, oracle_memory(stage.oracle, sizes.oracle, gpus)
    task = build_task(sizes.oracle)
    stage = LMStage(sizes.lm, (build_oracle(sizes.oracle, task), task))
    return stage, lm_memory(stage.lm, stage.oracle, sizes.lm, gpus)


def _count(stage: Stage) -> int | None:
    """The number of training images; None if the data are not there."""
    try:
        return len(stage.task.source(stage.run.data.root, stage.run.data.train_split))
    except UserError:
        return None


def make_plan(work: Work, hardware: Hardware) -> Plan:
    """Fits a training into devices. Raises UserError if it does not fit."""
    train, gpus = work.run.train, hardware.gpus
    if gpus > train.batch_size:
        raise UserError(
            f"--gpus {gpus}: train.batch_size={train.batch_size} gives some of them no image; use at most "
            f"{train.batch_size}, or a larger batch"
        )
    available = USABLE * hardware.memory_gb * 1e9
    found = smallest_accumulate(work.memory, replace(train, accumulate=1), available, gpus)
    if found is None:
        most = max(count for count in range(1, train.batch_size // gpus + 1) if train.batch_size % count == 0)
        fewest = -(-train.batch_size // (most * gpus))
        raise UserError(
            f"with {fewest} image(s) at a time, training takes {work.memory.of(fewest) / 1e9:.3g} GB, but "
            f"{available / 1e9:.3g} of --gpu-memory {hardware.memory_gb:g} GB are usable; use larger GPUs"
            + (" or a smaller model" if fewest == 1 else ", or a batch that --gpus divides")
        )
    micro = -(-train.batch_size // (found * gpus))
    low = DATASHEET[hardware.gpu] if train.precision != "fp32" else DATASHEET_FP32[hardware.gpu]
    seconds = (work.flops / low + work.fp32_flops / DATASHEET_FP32[hardware.gpu]) / hardware.share
    rate = gpus / seconds
    return Plan(work, hardware, found, micro, work.memory.of(micro), rate, work.images / rate / 3600)


def lines_of(plan: Plan) -> list[str]:
    """The plan as lines of text."""
    work, hardware = plan.work, plan.hardware
    run, train, gpus = work.run, work.run.train, hardware.gpus
    bf16, fp32 = DATASHEET[hardware.gpu] / 1e12, DATASHEET_FP32[hardware.gpu] / 1e12
    length = f"{work.steps:,} steps" if train.epochs is None else f"{work.samples:,} x {train.epochs:g} epochs"
    float32 = f" + {_number(work.fp32_flops / 1e9)} in float32" if work.fp32_flops else ""
    step_seconds = train.batch_size / plan.images_per_second
    rest = plan.bytes - work.memory.fixed - plan.micro_batch * work.memory.image
    logits = f" + {rest / 1e9:.3g} GB of label logits" if work.memory.logits else ""
    cost = f"{plan.gpu_hours:.3g} GPU hours"
    if hardware.price is not None:
        cost += f", {plan.gpu_hours * hardware.price:,.2f} at {hardware.price:,.2f} per GPU hour"
    size = f"{work.parameters / 1e6:,.1f} M trained parameters"
    peak = f"{bf16:g} TFLOP/s bf16 and fp16, {fp32:g} float32"
    each = _number(plan.images_per_second / gpus)
    rows = {
        "stage": f"{run.stage}, task {run.task.name}, {size}, {train.precision}",
        "devices": f"{gpus} x {hardware.gpu} with {hardware.memory_gb:g} GB",
        "batch": f"{train.batch_size} = {train.batch_size / (plan.accumulate * gpus):g} x {plan.accumulate} x {gpus} "
        "(images at a time x train.accumulate x GPUs)",
        "memory": f"{plan.bytes / 1e9:.3g} GB per GPU: {work.memory.fixed / 1e9:.3g} GB + "
        f"{work.memory.image / 1e9:.3g} GB per image{logits}; {USABLE * hardware.memory_gb:.3g} GB usable",
        "images": f"{work.images:,} ({length}, batch {train.batch_size})",
        "work": f"{_number(work.flops / 1e9)} GFLOP per image{float32}",
        "time": f"{_duration(plan.hours)} at {hardware.share:.0%} of the peak ({peak})",
        "loading": f"{_number(plan.images_per_second)} images/s in all, {each} per GPU",
        "cost": cost,
    }
    if gpus > 1:
        rows["exchange"] = f"{work.parameters * 4 / 1e9:.3g} GB of gradients, every {step_seconds:.3g} s"
    lines = [f"{name:8}  {text}" for name, text in rows.items()]
    if plan.accumulate != train.accumulate:
        lines.append(f"set       train.accumulate={plan.accumulate} (the configuration has {train.accumulate})")
    return [*lines, "Computed, not measured; data loading, evaluation and communication come on top."]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _duration(hours: float) -> str:
    if hours < 1:
        return f"{hours * 60:.3g} minutes"
    return f"{hours:.3g} hours" if hours < 72 else f"{hours / 24:.3g} days"
