"""Mean IoU against values computed by hand."""

from __future__ import annotations

import numpy as np
import pytest

from uvim_fsq.data.sample import Sample
from uvim_fsq.errors import UserError
from uvim_fsq.tasks.semantic_segmentation.metrics import SegmentationMetric, class_map


def sample_of(classes: list[list[int]]) -> Sample:
    truth = np.array(classes, np.int32)
    return Sample("x", np.zeros((*truth.shape, 3), np.uint8), {"classes": truth})


def test_figures_equal_values_computed_by_hand() -> None:
    """Class c is nowhere and left out of the mean; class d is only predicted and counts with 0."""
    metric = SegmentationMetric("p", ["a", "b", "c", "d"])
    row = metric.update(np.array([[0, 1, 1, 3, 2]]), sample_of([[0, 0, 1, 1, -1]]))
    assert row == pytest.approx({"miou": 100 * (1 / 2 + 1 / 3 + 0) / 3, "pixel_accuracy": 50, "labeled_pixels": 4})
    metric.update(np.array([[1]]), sample_of([[1, 1]]))  # resized
    expected = {"iou/a": 50, "iou/b": 60, "iou/d": 0, "miou": 110 / 3, "pixel_accuracy": 100 * 4 / 6}
    counts = {"classes": 3, "images": 2, "images_unlabeled": 0, "mean_accuracy": (50 + 75) / 2}
    assert metric.compute() == pytest.approx({**expected, **counts})
    matrix = metric.matrices()["confusion"]
    assert list(matrix.rows) == ["a", "b", "c", "d"] == list(matrix.columns)
    np.testing.assert_array_equal(matrix.values, [[1, 1, 0, 0], [0, 3, 0, 1], [0] * 4, [0] * 4])


def test_an_image_without_labels_is_counted_but_not_scored() -> None:
    metric = SegmentationMetric("p", ["a", "b"])
    assert metric.update(np.zeros((2, 2), int), sample_of([[-1, -1]])) == {"labeled_pixels": 0}
    with pytest.raises(UserError, match="no labeled pixel was evaluated, in 1 images"):
        metric.compute()
    metric.update(np.zeros((1, 2), int), sample_of([[0, -1]]))
    figures = metric.compute()
    assert (figures["images"], figures["images_unlabeled"], figures["miou"]) == (2, 1, 100)


def test_probabilities_are_resized_before_the_class_is_taken() -> None:
    """Between a sure and an unsure pixel, the border lies nearer to the unsure one."""
    shares = np.array([[[0.9, 0.1, 0.0], [0.4, 0.6, 0.0]]], np.float32)
    assert class_map(shares, (1, 8)).tolist() == [[0, 0, 0, 0, 0, 1, 1, 1]]
    assert class_map(shares.argmax(-1), (1, 8)).tolist() == [[0, 0, 0, 0, 1, 1, 1, 1]]
