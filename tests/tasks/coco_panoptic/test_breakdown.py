"""Panoptic quality by the size of segments."""

from __future__ import annotations

import numpy as np
import pytest

from uvim_fsq.data.sample import Sample
from uvim_fsq.tasks.coco_panoptic.breakdown import RANGES, QualityBySize
from uvim_fsq.tasks.coco_panoptic.metrics import PanopticMetric
from uvim_fsq.tasks.coco_panoptic.segments import Segments


def segments(ids: np.ndarray, classes: list[int]) -> Segments:
    count = len(classes)
    return Segments(ids.astype(np.int32), np.arange(1, count + 1), np.array(classes, np.int32), np.zeros(count, bool))


def test_segments_count_in_the_range_of_their_size() -> None:
    true, predicted = np.ones((10, 10)), np.ones((10, 10))
    true[0, :2] = 2  # 2% of the image, missed
    predicted[:2, 0] = 2
    predicted[9] = 3  # 10%, wrong class
    sample = Sample("a", np.zeros((10, 10, 3), np.uint8), {}, {"segments": segments(true, [1, 2])})
    prediction = segments(predicted, [1, 2, 2])
    found = QualityBySize(2, background=False)
    found.update(prediction, sample)
    (matrix,) = found.tables(found.state()).values()
    values = dict(zip(RANGES, matrix.values.tolist(), strict=True))
    iou = 100 * 87 / 99
    assert values["25% and more"] == pytest.approx([iou, iou, 100, 1, 1])
    assert values["1.6 to 6.4%"] == pytest.approx([0, np.nan, 0, 1, 1], nan_ok=True)
    assert values["6.4 to 25%"] == pytest.approx([0, np.nan, 0, 0, 1], nan_ok=True)
    assert np.isnan(values["below 0.1%"][:3]).all()
    # Summed over sizes, the counts are those of the protocol.
    metric = PanopticMetric("p", ["a", "b"], [True, True])
    metric.update(prediction, sample)
    assert found.counts.sum(0) == pytest.approx(metric.counts.sum(1))
