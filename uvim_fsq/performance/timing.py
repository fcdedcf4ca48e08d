"""Timing, and what a benchmark says: medians and spreads of repeats, beside a floor computed for the same machine."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of each repeat, and the most device memory in use meanwhile, in bytes (None on CPU)."""

    seconds: tuple[float, ...]
    peak_memory: int | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Largest less smallest, as a share of the median."""
        return (max(self.seconds) - min(self.seconds)) / self.median


@dataclass(frozen=True)
class Measurement:
    """One line of the benchmark's table.

    Attributes:
        name: what was measured, the same from run to run, so that two runs can be compared.
        value: the median, in `unit`.
        unit: "images/s" (more is better) or "ms" (less is better).
        spread: of the repeats, as a share of the median.
        floor: what the machine allows at best, in `unit`; None where nothing was computed.
        peak_memory: bytes of device memory.
        further: other figures, name -> number or text.
    """

    name: str
    value: float
    unit: str
    spread: float = 0.0
    floor: float | None = None
    peak_memory: int | None = None
    further: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ratio(self) -> float | None:
        """Share of the floor that is reached, 1 at best."""
        if self.floor is None:
            return None
        return self.value / self.floor if more_is_better(self.unit) else self.floor / self.value


def more_is_better(unit: str) -> bool:
    return unit.endswith("/s")


def time_repeats(work: Callable[[], object], device: torch.device, *, warmup: int = 2, repeats: int = 5) -> Timing:
    """Times `work()`: after `warmup` calls, each of `repeats` calls by itself, by device events on a GPU."""
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
    between = [first.elapsed_time(last) / 1000 for first, last in zip(events, events[1:], strict=False)]
    return Timing(tuple(between), torch.cuda.max_memory_allocated(device))


def time_ways(
    ways: Mapping[str, Callable[[], object]], device: torch.device, *, warmup: int = 2, repeats: int = 5
) -> dict[str, Timing]:
    """Times several ways of doing the same, turn by turn, so that a machine's changes meet all of them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    peaks: dict[str, int | None] = {}
    for repeat in range(repeats):
        for name, work in ways.items():
            timing = time_repeats(work, device, warmup=warmup if repeat == 0 else 0, repeats=1)
            seconds[name] += timing.seconds
            peaks[name] = timing.peak_memory
    return {name: Timing(tuple(values), peaks[name]) for name, values in seconds.items()}


def time_made(
    ways: Mapping[str, Callable[[], Callable[[], object]]],
    device: torch.device,
    *,
    warmup: int = 2,
    repeats: int = 5,
) -> dict[str, Timing]:
    """Times several ways of doing the same, given as what makes them.

    Turn by turn on a CPU; one after the other on a GPU, whose memory each then has for itself.
    """
    if device.type != "cuda":
        made = {name: make() for name, make in ways.items()}
        return time_ways(made, device, warmup=warmup, repeats=repeats)
    timings = {}
    for name, make in ways.items():
        timings[name] = time_repeats(make(), device, warmup=warmup, repeats=repeats)
        gc.collect()
        torch.cuda.empty_cache()
    return timings


def rate(name: str, timing: Timing, count: int, **more: Any) -> Measurement:
    """`count` images in each repeat, as images/s."""
    return Measurement(name, count / timing.median, "images/s", timing.spread, peak_memory=timing.peak_memory, **more)


def milliseconds(name: str, timing: Timing, count: int = 1, **more: Any) -> Measurement:
    """Each repeat does the work `count` times; milliseconds of one."""
    value = 1000 * timing.median / count
    return Measurement(name, value, "ms", timing.spread, peak_memory=timing.peak_memory, **more)
