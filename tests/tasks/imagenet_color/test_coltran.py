"""ColTran's image lists, cropping and area resizing."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from uvim_fsq.tasks.imagenet_color.coltran import (
    area_resize,
    crop_and_resize,
    evaluation_names,
    prediction_uint8,
    reference_names,
    write_lists,
)

RNG = np.random.default_rng(0)


def test_the_lists_are_coltrans(tmp_path: Path) -> None:
    digests = [hashlib.sha256("\n".join(names()).encode()).hexdigest() for names in (evaluation_names, reference_names)]
    assert digests == [
        "b0627a4677d206b64905ec4d70760f50f7b09363f65e624957c3d1cccb49eb89",
        "3d59b1214977c0021158d4264b3b18e4af1ff71cd24d22f6bedd39f57658f172",
    ]
    written = write_lists(tmp_path / "lists")
    assert [path.name for path in written] == ["coltran_evaluation.txt", "coltran_reference.txt"]
    assert [path.read_text().splitlines() for path in written] == [evaluation_names(), reference_names()]


@pytest.mark.parametrize(("size", "new"), [(12, 6), (12, 4), (12, 5), (7, 12), (5, 5), (30, 7), (1, 3), (9, 1)])
def test_area_resize_averages_exact_areas(size: int, new: int) -> None:
    np.testing.assert_allclose(area_resize(np.full((size, size, 3), 37, np.uint8), new), 37, rtol=1e-14)
    image = RNG.uniform(-1, 1, (size, size, 3))
    resized = area_resize(image, new)
    assert resized.shape == (new, new, 3)
    np.testing.assert_allclose(resized.mean((0, 1)), image.mean((0, 1)), atol=1e-14)  # all pixels have the same weight
    # The same by brute force: each pixel is repeated until the factor is an integer.
    fine = image.repeat(new, 0).repeat(new, 1).reshape(new, size, new, size, 3).mean((1, 3))
    np.testing.assert_allclose(resized, fine, atol=1e-14)


def test_area_resize_by_two_is_the_box_mean() -> None:
    image = RNG.integers(0, 256, (16, 16, 3), dtype=np.uint8)
    mean = image.reshape(8, 2, 8, 2, 3).mean((1, 3))
    np.testing.assert_array_equal(area_resize(image, 8), mean)
    assert (mean % 1 == 0.5).any()
    np.testing.assert_array_equal(crop_and_resize(image, 8), np.rint(mean))  # rounds half to even


def test_crop_drops_the_last_line_of_an_odd_remainder() -> None:
    image = np.arange(5 * 8 * 3, dtype=np.uint8).reshape(5, 8, 3)
    np.testing.assert_array_equal(crop_and_resize(image, 5), image[:, 1:6])
    np.testing.assert_array_equal(crop_and_resize(image.transpose(1, 0, 2), 5), image[:, 1:6].transpose(1, 0, 2))


def test_predictions_are_rounded_to_the_256_levels() -> None:
    y = np.array([-1, -1 + 0.5 / 128, -1 + 1.5 / 128, 0, 1, 1.5, -7, np.nan, np.inf], np.float32)
    image = np.broadcast_to(y[:, None, None], (9, 9, 3))
    np.testing.assert_array_equal(prediction_uint8(image, 9)[:, 0, 0], [0, 0, 2, 128, 255, 255, 0, 128, 255])
