"""`uvim-fsq benchmark`: which jobs there are and what each one measures."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from uvim_fsq import processes
from uvim_fsq.benchmark.decoding import measure_decoding, precision_on
from uvim_fsq.benchmark.loader import measure_loader
from uvim_fsq.benchmark.metrics import measure_metrics
from uvim_fsq.benchmark.setup import Sizes, fresh_lm, made_up_batch, read_sizes
from uvim_fsq.benchmark.side_by_side import measure_side_by_side
from uvim_fsq.benchmark.table import about, markdown, read_earlier, to_json
from uvim_fsq.benchmark.training import measure_training, stage_of, stepper_of, steps
from uvim_fsq.errors import UserError
from uvim_fsq.performance.device_peak import DevicePeak, measure_device_peak
from uvim_fsq.performance.timing import Measurement

JOBS = ("train-oracle", "train-lm", "decode", "side-by-side", "loader", "metrics", "all")
BATCHES = {"cuda": (1, 16, 64, 256), "cpu": (1, 32)}


@dataclass(frozen=True)
class BenchmarkRequest:
    """What to measure. `batches`: of decoding; the first one of training; () for the usual ones."""

    job: str
    sizes: Sizes | None
    batches: tuple[int, ...] = ()
    repeats: int = 5


def read_request(
    job: str,
    config: str | Path | None,
    overrides: Sequence[str],
    *,
    oracle: Path | None = None,
    batches: tuple[int, ...] = (),
    repeats: int = 5,
) -> BenchmarkRequest:
    """Raises UserError for a job that lacks its configuration or gets one of the other stage."""
    if repeats < 1 or any(batch < 1 for batch in batches):
        raise UserError("--repeats and --batch must be at least 1")
    if job == "metrics":
        return BenchmarkRequest(job, None, batches, repeats)
    if config is None:
        raise UserError(f"benchmark {job} needs a configuration, e.g. nyu_depth/lm")
    sizes = read_sizes(config, overrides, oracle)
    if job in ("train-lm", "decode", "side-by-side", "all") and sizes.lm is None:
        raise UserError(f"benchmark {job} needs a configuration of stage lm; {config} is one of stage oracle")
    if job == "train-oracle":
        sizes = Sizes(sizes.oracle, None)
    return BenchmarkRequest(job, sizes, batches, repeats)


def measure(asked: BenchmarkRequest, say: Callable[[str], None]) -> tuple[list[Measurement], DevicePeak]:
    """Runs the job; the ceilings come first, in the same run."""
    device = processes.device()
    precision = asked.sizes.run.train.precision if asked.sizes and asked.job.startswith("train") else "bf16"
    ceilings = measure_device_peak(device, precision)
    say(about(ceilings))
    lines: list[Measurement] = []
    for job in JOBS[:-1] if asked.job == "all" else (asked.job,):
        say(f"measuring {job}")
        try:
            lines += _measure(job, asked, ceilings, device)
        except UserError as error:
            if asked.job != "all":
                raise
            # What the other jobs measured is not lost.
            say(f"not measured: {error}")
    return lines, ceilings


def _measure(job: str, asked: BenchmarkRequest, ceilings: DevicePeak, device: torch.device) -> list[Measurement]:
    sizes, repeats = asked.sizes, asked.repeats
    if sizes is None or job == "metrics":
        return measure_metrics(repeats=repeats)
    batches = asked.batches or BATCHES[device.type]
    if job == "decode":
        return measure_decoding(sizes, ceilings, device, batches=batches, repeats=repeats)
    if job == "side-by-side":
        # The naive loop takes minutes for larger batches.
        some = asked.batches or [batch for batch in batches if batch <= 64]
        return measure_side_by_side(sizes, device, batches=some, repeats=repeats)
    if job == "loader":
        return measure_loader(sizes.run, repeats=repeats)
    sizes = Sizes(sizes.oracle, None) if job == "train-oracle" else sizes
    return measure_training(sizes, ceilings, device, batch_size=_training_batch(asked, sizes), repeats=repeats)


def _training_batch(asked: BenchmarkRequest, sizes: Sizes) -> int:
    return asked.batches[0] if asked.batches else min(sizes.run.train.batch_size, 64)


def _one_step(asked: BenchmarkRequest, sizes: Sizes, device: torch.device) -> Callable[[], object]:
    """A training step, or the decoding of a batch."""
    run = sizes.run
    if asked.job == "decode":
        lm, task = fresh_lm(sizes, device)
        assert sizes.lm is not None
        config = sizes.lm.eval
        decoder = lm.generator(
            precision=precision_on(device), int8_cross_kv=config.int8_cross_kv, compile=config.compile
        )
        batch = asked.batches[0] if asked.batches else BATCHES[device.type][1]
        return functools.partial(decoder, made_up_batch(task, run.data.image_size, batch, device)["image"], None)
    batch = _training_batch(asked, sizes)
    stage = stage_of(sizes)
    data = made_up_batch(stage.task, run.data.image_size, batch, device)
    return steps(stepper_of(stage, run, batch), itertools.repeat(data))


def operators(asked: BenchmarkRequest, count: int) -> str:
    """Where the time of training or decoding goes: the `count` operators that take most of it, by torch's profiler."""
    assert asked.sizes is not None
    device = processes.device()
    step = _one_step(asked, asked.sizes, device)
    for _ in range(3):
        step()
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as profile:
        for _ in range(3):
            step()
    order = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    return profile.key_averages().table(sort_by=order, row_limit=count, max_name_column_width=60)


def run_benchmark(
    asked: BenchmarkRequest,
    *,
    json_file: Path | None,
    against: Path | None,
    num_operators: int,
    say: Callable[[str], None],
) -> None:
    """Measures, prints the table, writes and compares."""
    if num_operators and asked.job not in ("train-oracle", "train-lm", "decode"):
        raise UserError("--operators goes with train-oracle, train-lm and decode")
    earlier = read_earlier(against) if against else None
    lines, ceilings = measure(asked, say)
    say(markdown(lines, earlier))
    if earlier is not None and earlier["ceilings"]["device"] != ceilings.device:
        say(f"note: {against} was measured on another device: {earlier['ceilings']['device']}")
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(to_json(lines, ceilings), indent=1) + "\n")
    if num_operators:
        say(operators(asked, num_operators))
