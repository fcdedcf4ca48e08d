"""Depth maps are colored like matplotlib's viridis, in little memory."""

from __future__ import annotations

import tracemalloc

import numpy as np

from uvim_fsq.tasks.legend import color


def test_depth_is_colored_by_a_table() -> None:
    import matplotlib

    values = np.random.default_rng(0).random((50, 70)).astype(np.float32) * 12
    values[0, :3] = (10.0, np.nan, -1)
    share = np.clip(np.nan_to_num(values) / 10.0, 0, 1)
    expected = (matplotlib.colormaps["viridis"](share)[..., :3] * 255).astype(np.uint8)
    assert np.array_equal(color(values, 10.0), expected)
    big = np.ones((2000, 2000), np.float32)
    tracemalloc.start()
    color(big, 10.0)
    used = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert used / big.size < 25, "bytes per pixel"
