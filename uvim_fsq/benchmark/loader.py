"""Speed of the training loader: of one core, step by step, and of the whole loader. Needs the data set."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

from uvim_fsq.checkpoints.loading import build_task
from uvim_fsq.config.schema import LMRun, OracleRun
from uvim_fsq.data.decoded import keep_decoded
from uvim_fsq.data.loader import TrainLoader, keep_freed_memory
from uvim_fsq.data.sample import SampleSource
from uvim_fsq.data.transforms import JointTransform
from uvim_fsq.performance.timing import Measurement, rate, time_repeats
from uvim_fsq.tasks.base import Task

CPU = torch.device("cpu")
#: Samples per repeat on one core, evenly spaced over the split.
SAMPLES = 48
BATCH = 32
STEPS: tuple[str, ...] = ("read", "resample", "encode")


@contextmanager
def _as_in_a_worker() -> Iterator[None]:
    """One thread, and freed memory kept, as in a loader process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    keep_freed_memory()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def measure_loader(run: OracleRun | LMRun, *, repeats: int) -> list[Measurement]:
    """Images/s of one core, milliseconds of each of its steps, and images/s of the loader with its workers.

    An untimed first pass brings the files, or what `data.cache_dir` keeps of them, into the page cache, so that neither
    the disk nor the first epoch is measured. The loader's limit is
    the rate of one core times the number of cores that its workers may use.

    Args:
        run: a resolved configuration of either stage; `data.root` must hold its data.

    Raises:
        UserError: the data are missing or a sample cannot be read.
    """
    task = build_task(run)
    source = task.source(run.data.root, run.data.train_split)
    name = f"loader {task.name} at {run.data.image_size}"
    lines = _one_core(name, source, JointTransform(run.data, task, train=True), run.data.cache_dir, repeats)
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = min(max(run.data.workers, 1), available)
    return [*lines, _whole_loader(name, run, task, source, repeats, roofline=cores * lines[0].value)]


def _one_core(
    name: str, source: SampleSource, transform: JointTransform, folder: str, repeats: int
) -> list[Measurement]:
    indices = np.unique(np.linspace(0, len(source) - 1, SAMPLES).round().astype(int)).tolist()
    passes: list[dict[str, float]] = []

    def work() -> None:
        spent = dict.fromkeys(STEPS, 0.0)

        def timed(step: str, make: Callable[[], object]) -> object:
            start = time.perf_counter()
            made = make()
            spent[step] += time.perf_counter() - start
            return made

        for index in indices:
            _sample(source, transform, index, 1000 * len(passes) + index, timed)
        passes.append(spent)

    with _as_in_a_worker(), keep_decoded(folder):
        timing = time_repeats(work, CPU, warmup=1, repeats=repeats)
    lines = [rate(f"{name}, one core", timing, len(indices))]
    for step in STEPS:
        each = [1000 * spent[step] / len(indices) for spent in passes[1:]]
        median = statistics.median(each)
        spread = (max(each) - min(each)) / max(median, 1e-9)
        lines.append(Measurement(f"{name}, one core: {step}", median, "ms", spread))
    return lines


def _sample(source: SampleSource, transform: JointTransform, index: int, seed: int, timed: Callable) -> None:
    """Does what a worker does for one sample, each step through `timed`."""
    sample = timed("read", lambda: source[index])
    resized = timed("resample", lambda: transform.resample(sample, seed))
    timed("encode", lambda: transform.encode(resized))


def _whole_loader(
    name: str, run: OracleRun | LMRun, task: Task, source: SampleSource, repeats: int, roofline: float
) -> Measurement:
    size, workers = min(run.train.batch_size, BATCH, len(source)), run.data.workers
    loader = TrainLoader(source, task, run.data, batch_size=size, seed=run.train.seed)
    batches = loader.batches(0, 2**31)
    # Workers deliver in turns, so only whole rounds give their rate. The first rounds find a full queue and warm up.
    rounds = 2 * max(workers, 1)
    timing = time_repeats(lambda: [next(batches) for _ in range(rounds)], CPU, warmup=2, repeats=repeats)
    return rate(f"{name}, {workers} workers, batch {size}", timing, rounds * size, roofline=roofline)
