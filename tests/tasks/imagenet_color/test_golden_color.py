"""Gray images and the ColTran protocol's resizing equal the reference's."""

from __future__ import annotations

import numpy as np

from tests.support.golden import golden
from uvim_fsq.data.sample import Sample
from uvim_fsq.tasks.imagenet_color.coltran import (
    crop_and_resize,
    prediction_uint8,
)
from uvim_fsq.tasks.imagenet_color.task import ImagenetColor, ImagenetColorConfig

TASK = ImagenetColor(ImagenetColorConfig())


def test_gray_images_equal_the_references() -> None:
    numbers = golden("pipeline.npz")
    np.testing.assert_array_equal(TASK.model_image(Sample("x", numbers["gray/in"])), numbers["gray/uint8_out"])
    view = Sample("x", numbers["gray/in"], {}, {"scale": 128.0})
    np.testing.assert_array_equal(TASK.encode(view)["color"], numbers["gray/float_in"])
    np.testing.assert_allclose(TASK.model_image(view), numbers["gray/float_out"], atol=1e-6)


def test_area_resizing_and_rounding_equal_the_references() -> None:
    numbers = golden("pipeline.npz")
    for size in (64, 32):
        resized = crop_and_resize(numbers["coltran/in"], size)
        assert resized.dtype == np.uint8
        np.testing.assert_array_equal(resized, numbers[f"coltran/area_{size}"])
    levels = prediction_uint8(numbers["coltran/pred_in"][0], 32)
    assert levels.dtype == np.uint8
    np.testing.assert_array_equal(levels, numbers["coltran/pred_uint8"][0])
    np.testing.assert_array_equal(levels.astype(np.float32) / 128 - 1, numbers["coltran/pred_normalized"][0])
