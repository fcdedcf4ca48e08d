"""Nearest-neighbour resizing with half-pixel centres, exact for every size. `F.interpolate`, PIL and OpenCV differ."""

from __future__ import annotations

import numpy as np


def nearest_index(size: int, new: int) -> np.ndarray:
    """(new,) int64 source positions floor((i + 0.5) * size / new)."""
    return np.minimum(((np.arange(new) * 2 + 1) * size) // (2 * new), size - 1)


def resize_nearest(array: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W, ...) of any dtype -> (height, width, ...)."""
    if array.shape[:2] == tuple(size):
        return array
    rows, columns = nearest_index(array.shape[0], size[0]), nearest_index(array.shape[1], size[1])
    return array[rows[:, None], columns[None]]
