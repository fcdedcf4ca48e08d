"""Tiles cover a picture, and what is predicted for them is aligned and blended."""

from __future__ import annotations

import numpy as np
import pytest

from uvim_fsq.data.tiles import Tile, Tiling, align, blend
from uvim_fsq.errors import UserError


@pytest.mark.parametrize("size", [(100, 100), (100, 37), (32, 33), (257, 64), (1, 500)])
@pytest.mark.parametrize("overlap", [0, 0.25, 0.75])
def test_tiles_cover_every_pixel_and_overlap_as_much_as_asked(size: tuple[int, int], overlap: float) -> None:
    tiles = Tiling(32, overlap).cover(*size)
    seen = np.zeros(size, int)
    for tile in tiles:
        part = tile.of(seen)
        part += 1
        assert part.shape == (tile.height, tile.width) == (min(32, size[0]), min(32, size[1]))
    assert seen.min() >= 1 and len(set(tiles)) == len(tiles)
    for starts in ({tile.top for tile in tiles}, {tile.left for tile in tiles}):
        steps = np.diff(sorted(starts))
        assert steps.size == 0 or steps.max() <= 32 - round(32 * overlap)


def test_a_picture_that_fits_is_one_tile() -> None:
    assert Tiling(64).cover(64, 20) == [Tile(0, 0, 64, 20)]


@pytest.mark.parametrize(
    ("side", "overlap", "message"),
    [
        (15, 0.25, "too small"),
        (-1, 0.25, "too small"),
        (64, 0.8, "overlap"),
        (64, -0.1, "overlap"),
        (64, np.nan, "overlap"),
    ],
)
def test_impossible_tiles_are_refused(side: int, overlap: float, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Tiling(side, overlap)


def test_too_many_tiles_are_refused_in_one_line() -> None:
    with pytest.raises(UserError, match="10000 x 10000 pixels make .* tiles of 16 pixels.*; choose larger tiles"):
        Tiling(16).cover(10_000, 10_000)


@pytest.mark.parametrize("channels", [(), (3,)])
def test_tiles_that_agree_are_blended_to_the_whole(channels: tuple[int, ...]) -> None:
    values = np.random.default_rng(0).normal(size=(50, 70, *channels)).astype(np.float32)
    found = blend((50, 70), ((tile, tile.of(values)) for tile in Tiling(24).cover(50, 70)))
    np.testing.assert_allclose(found, values, atol=1e-5)


def test_the_seam_between_two_tiles_is_gradual() -> None:
    tiles = Tiling(32, 0.5).cover(32, 48)
    row = blend((32, 48), ((tile, np.full((32, 32), number)) for number, tile in enumerate(tiles)))[16]
    assert row[0] == 0 and row[-1] == 1 and (np.diff(row) >= 0).all() and np.diff(row).max() < 0.1


def test_scale_and_shift_are_found_from_a_reference_without_details() -> None:
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[0:64, 0:64] / 64
    smooth = 2 + rows + 2 * columns
    detailed = smooth + rng.normal(0, 0.5, smooth.shape)
    found = align(3 * detailed - 5, smooth)
    np.testing.assert_allclose(found, detailed, atol=0.15)
    assert abs(np.std(found - smooth) / 0.5 - 1) < 0.05  # the details keep their size


@pytest.mark.parametrize("given", [np.full((8, 8), 7.0), -np.arange(64.0).reshape(8, 8)])
def test_without_a_common_rise_only_the_means_are_made_equal(given: np.ndarray) -> None:
    reference = np.arange(64.0).reshape(8, 8)
    np.testing.assert_allclose(align(given, reference), given - given.mean() + reference.mean(), atol=1e-5)
