"""PSNR, and predictions that keep the photo's brightness."""

from __future__ import annotations

import numpy as np
import pytest

from tests.support.photos import LUMA
from tests.support.photos import random_photo as photo
from uvim_fsq.data.sample import Sample
from uvim_fsq.errors import UserError
from uvim_fsq.tasks.imagenet_color.metrics import PSNRMetric, keep_luma, to_unit
from uvim_fsq.tasks.imagenet_color.task import ImagenetColor, ImagenetColorConfig

RNG = np.random.default_rng(0)
TASK = ImagenetColor(ImagenetColorConfig())


def test_psnr_equals_values_computed_by_hand() -> None:
    image = np.full((4, 4, 3), 255, np.uint8)
    metric = PSNRMetric("p", luma=False)
    row = metric.update(np.zeros((4, 4, 3), np.float32), Sample("a", image))
    assert [row["psnr"], row["mse"]] == pytest.approx([10 * np.log10(4), 1.0])
    assert metric.update(np.full((4, 4, 3), 0.9, np.float32), Sample("b", image))["psnr"] == pytest.approx(
        10 * np.log10(4 / 0.01), abs=1e-4
    )
    figures = metric.compute()
    assert figures["psnr"] == pytest.approx((10 * np.log10(4) + 10 * np.log10(400)) / 2, abs=1e-4)  # mean over images
    assert figures["images"] == 2
    assert metric.update(np.ones((4, 4, 3), np.float32), Sample("c", image))["psnr"] == 100  # equal pictures
    with pytest.raises(UserError, match="no image was evaluated"):
        PSNRMetric("p", luma=False).compute()


def test_keep_luma_changes_the_brightness_and_nothing_else() -> None:
    prediction, image = RNG.uniform(-0.3, 0.3, (2, 6, 6, 3)).astype(np.float32)
    kept = keep_luma(prediction, image)
    np.testing.assert_allclose(kept @ LUMA, image @ LUMA, atol=1e-6)
    for a, b in ((0, 1), (1, 2)):  # differences between channels define the color
        np.testing.assert_allclose(kept[..., a] - kept[..., b], prediction[..., a] - prediction[..., b], atol=1e-6)
    assert keep_luma(np.ones_like(image), -np.ones_like(image)).min() >= -1
    sample = photo(8, 8)
    task = ImagenetColor(ImagenetColorConfig(keep_luma=True))
    metric = task.metric(object())
    assert metric.protocol == "imagenet_color/psnr+keep_luma"
    gray, label = (to_unit(x, sample) for x in (TASK.model_image(sample), TASK.encode(sample)["color"]))
    right_color = label + RNG.uniform(-0.2, 0.2, (8, 8, 1)).astype(np.float32)
    inside = np.abs(right_color).max() <= 1
    assert metric.update(right_color, sample)["mse"] < (1e-10 if inside else 1e-2)
    assert metric.update(gray, sample)["mse"] > 1e-3
