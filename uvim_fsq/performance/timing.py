"""Timing of repeated work, and the measurements that a benchmark reports next to their roofline limits."""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of each repeat, and the peak of allocated device memory in bytes (None on a CPU)."""

    seconds: tuple[float, ...]
    peak_memory: int | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """(largest - smallest) / median."""
        return (max(self.seconds) - min(self.seconds)) / self.median


@dataclass(frozen=True)
class Measurement:
    """One line of the benchmark's table.

    Attributes:
        name: what was measured. It is the same in each run, so that runs can be compared.
        value: the median, in `unit`.
        unit: "images/s" (higher is better), "ms" or "MB" (lower is better).
        spread: (largest - smallest) / median of the repeats.
        roofline: limit of the device, in `unit`; None if it was not computed.
        peak_memory: peak of allocated device memory, in bytes.
        other: other figures, name -> number or text.
    """

    name: str
    value: float
    unit: str
    spread: float = 0.0
    roofline: float | None = None
    peak_memory: int | None = None
    other: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ratio(self) -> float | None:
        """The fraction of the roofline limit that is reached, at most 1."""
        if self.roofline is None:
            return None
        return self.value / self.roofline if more_is_better(self.unit) else self.roofline / self.value


def more_is_better(unit: str) -> bool:
    """Whether a larger value is better: of rates, not of durations."""
    return unit.endswith("/s")


def time_repeats(work: Callable[[], object], device: torch.device, *, warmup: int = 2, repeats: int = 5) -> Timing:
    """Times each of `repeats` calls of `work` after `warmup` calls. On a GPU the clock is CUDA events."""
    for _ in range(warmup):
        work()
    if device.type != "cuda":
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - start)
        return Timing(tuple(seconds))
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        work()
        event.record()
    torch.cuda.synchronize(device)
    seconds_between = [start.elapsed_time(end) / 1000 for start, end in itertools.pairwise(events)]
    return Timing(tuple(seconds_between), torch.cuda.max_memory_allocated(device))


def time_interleaved(
    variants: Mapping[str, Callable[[], object]], device: torch.device, *, warmup: int = 2, repeats: int = 5
) -> dict[str, Timing]:
    """Times several variants of the same work in turns, so that changes in machine load affect all of them equally."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    peaks: dict[str, int | None] = {}
    for repeat in range(repeats):
        for name, work in variants.items():
            timing = time_repeats(work, device, warmup=warmup if repeat == 0 else 0, repeats=1)
            seconds[name] += timing.seconds
            peaks[name] = timing.peak_memory
    return {name: Timing(tuple(values), peaks[name]) for name, values in seconds.items()}


def time_built(
    builders: Mapping[str, Callable[[], Callable[[], object]]],
    device: torch.device,
    *,
    warmup: int = 2,
    repeats: int = 5,
) -> dict[str, Timing]:
    """Times several variants of the same work, each given as a function that builds it.

    On a CPU they take turns. On a GPU one follows the other, so that each has the device memory to itself.
    """
    if device.type != "cuda":
        variants = {name: build() for name, build in builders.items()}
        return time_interleaved(variants, device, warmup=warmup, repeats=repeats)
    timings = {}
    for name, build in builders.items():
        timings[name] = time_repeats(build(), device, warmup=warmup, repeats=repeats)
        gc.collect()
        torch.cuda.empty_cache()
    return timings


def rate(name: str, timing: Timing, count: int, **more: Any) -> Measurement:
    """A measurement in images/s; each repeat processes `count` images."""
    return Measurement(name, count / timing.median, "images/s", timing.spread, peak_memory=timing.peak_memory, **more)


def milliseconds(name: str, timing: Timing, count: int = 1, **more: Any) -> Measurement:
    """A measurement in milliseconds per item; each repeat processes `count` items."""
    value = 1000 * timing.median / count
    return Measurement(name, value, "ms", timing.spread, peak_memory=timing.peak_memory, **more)
