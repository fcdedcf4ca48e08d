"""Timings of repeated and alternating functions."""

from __future__ import annotations

import time

import torch

from uvim_fsq.performance.timing import time_interleaved, time_repeats

CPU = torch.device("cpu")


def test_timings_are_of_each_repeat_and_variants_take_turns() -> None:
    order: list[str] = []

    def slow() -> None:
        order.append("slow")
        time.sleep(0.02)

    timing = time_repeats(slow, CPU, warmup=1, repeats=3)
    assert len(timing.seconds) == 3 and 0.019 < timing.median < 0.2 and len(order) == 4
    order.clear()
    timings_by_name = time_interleaved(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, CPU, warmup=0, repeats=2
    )
    assert order == ["a", "b", "a", "b"] and set(timings_by_name) == {"a", "b"}
