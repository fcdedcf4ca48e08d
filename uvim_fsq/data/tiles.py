"""Overlapping tiles that cover a picture, and the blending of what was predicted for them.

H, W height and width of the picture; h, w of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import cv2
import numpy as np

from uvim_fsq.data.sample import Array
from uvim_fsq.errors import UserError

#: Smallest side of a tile in pixels, and the most tiles of one picture.
MIN_SIDE, MAX_TILES = 16, 4096
#: Cells of a tile along each side, whose means `align` compares.
CELLS = 16


@dataclass(frozen=True)
class Tile:
    """A rectangle of a picture, in pixels."""

    top: int
    left: int
    height: int
    width: int

    def of(self, array: Array) -> Array:
        """The tile's part of an array (H, W, ...): a view (h, w, ...)."""
        return array[self.top : self.top + self.height, self.left : self.left + self.width]

    def weight(self) -> Array:
        """(h, w) float32 above 0: falls linearly from the middle to the edges, where a prediction knows least."""
        rows, columns = (np.minimum(np.arange(n), np.arange(n)[::-1]) + 0.5 for n in (self.height, self.width))
        return np.outer(rows / rows.max(), columns / columns.max()).astype(np.float32)


@dataclass(frozen=True)
class Tiling:
    """How pictures are divided.

    Args:
        side: of the square tiles, in pixels of the picture; at least 16.
        overlap: the least share of the side that neighbors have in common, from 0 to 0.75.

    Raises UserError for other values.
    """

    side: int
    overlap: float = 0.25

    def __post_init__(self) -> None:
        if self.side < MIN_SIDE:
            raise UserError(f"tiles of {self.side} pixels are too small; give {MIN_SIDE} or more")
        if not 0 <= self.overlap <= 0.75:
            raise UserError(f"an overlap of {self.overlap:g} is not possible; give a share from 0 to 0.75")

    def __str__(self) -> str:
        return f"{self.side} pixels, overlap {self.overlap:g}"

    def cover(self, height: int, width: int) -> list[Tile]:
        """The tiles of a picture, row by row, evenly spaced; a picture that fits into one is one tile.

        Where the picture is smaller than a tile, the tile is as small. Raises UserError for more than 4,096 tiles.
        """
        rows, columns = self._starts(height), self._starts(width)
        if len(rows) * len(columns) > MAX_TILES:
            raise UserError(
                f"{width} x {height} pixels make {len(rows) * len(columns)} tiles of {self.side} pixels, more than "
                f"{MAX_TILES}; choose larger tiles"
            )
        h, w = min(self.side, height), min(self.side, width)
        return [Tile(top, left, h, w) for top in rows for left in columns]

    def _starts(self, length: int) -> list[int]:
        if length <= self.side:
            return [0]
        common = round(self.side * self.overlap)
        count = math.ceil((length - common) / (self.side - common))
        return [round(i * (length - self.side) / (count - 1)) for i in range(count)]


def blend(size: tuple[int, int], parts: Iterable[tuple[Tile, Array]]) -> Array:
    """The weighted mean of real values that were predicted for overlapping tiles.

    Args:
        size: (H, W).
        parts: tiles that cover the picture, each with (h, w) or (h, w, C) real values.

    Returns:
        (H, W) or (H, W, C) float32.
    """
    total: Array | None = None
    weights = np.zeros(size, np.float32)
    for tile, values in parts:
        if total is None:
            total = np.zeros((*size, *values.shape[2:]), np.float32)
        weight = tile.weight()
        tile.of(weights)[...] += weight
        tile.of(total)[...] += values * weight.reshape(*weight.shape, *[1] * (values.ndim - 2))
    if total is None:
        raise ValueError("no tiles")
    total /= weights.reshape(*size, *[1] * (total.ndim - 2))
    return total


def align(values: Array, reference: Array) -> Array:
    """Values scaled and shifted to a reference by least squares (as in MiDaS, arXiv 1907.01341), over means of cells.

    Cells, because details that the reference lacks would draw the scale towards 0. Where the two do not rise together,
    the scale would be 0 or negative; then only the means are made equal.

    Args:
        values, reference: (h, w) real values.

    Returns:
        (h, w) float32.
    """
    x, y = (_cells(array) for array in (values, reference))
    dx, dy = x - x.mean(), y - y.mean()
    variance, common = (dx * dx).mean(), (dx * dy).mean()
    scale = common / variance if variance > 1e-12 and common > 0 else 1.0
    return (values * scale + (y.mean() - scale * x.mean())).astype(np.float32)


def _cells(values: Array) -> Array:
    """(h, w) -> means of at most CELLS x CELLS cells, float64."""
    height, width = (min(CELLS, n) for n in values.shape)
    return cv2.resize(values.astype(np.float64), (width, height), interpolation=cv2.INTER_AREA)
