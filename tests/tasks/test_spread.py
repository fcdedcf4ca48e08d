"""How much several predictions of one image differ, by task."""

from __future__ import annotations

import numpy as np

from tests.support.small import TASKS
from uvim_fsq.tasks.base import Task
from uvim_fsq.tasks.coco_panoptic.segments import Segments
from uvim_fsq.tasks.semantic_segmentation.task import SemanticSegmentation, SemanticSegmentationConfig


def test_depth_spreads_in_meters() -> None:
    found = TASKS["depth"].spread([np.full((2, 3), d, np.float32) for d in (1, 3)])
    assert found is not None and found.shape == (2, 3) and found.dtype == np.float32 and (found == 1).all()


def test_colors_spread_by_their_mean_variance() -> None:
    gray, red = np.zeros((2, 2, 3), np.float32), np.zeros((2, 2, 3), np.float32)
    red[0, 0] = [1, 0, 0]
    found = TASKS["color"].spread([gray, red])
    assert found is not None
    np.testing.assert_allclose(found, [[np.sqrt(0.25 / 3), 0], [0, 0]], rtol=1e-6)


def test_classes_spread_by_the_share_that_disagrees() -> None:
    classes = tuple((c, f"class {c}", "") for c in range(3))
    task = SemanticSegmentation(SemanticSegmentationConfig(classes=classes))
    predictions = [np.array([[0, 1]]), np.array([[0, 2]]), np.array([[0, 2]]), np.array([[0, 0]])]
    np.testing.assert_array_equal(task.spread(predictions), np.array([[0, 0.5]], np.float32))


def test_segments_spread_by_their_classes_not_their_numbers() -> None:
    def segments(ids: list[list[int]], numbers: list[int], classes: list[int]) -> Segments:
        crowd = np.zeros(len(numbers), bool)
        return Segments(np.array(ids, np.int32), np.array(numbers, np.int64), np.array(classes, np.int32), crowd)

    one = segments([[1, 2, 0]], [1, 2], [1, 2])
    other = segments([[7, 1, 0]], [7, 1], [1, 1])
    np.testing.assert_array_equal(TASKS["panoptic"].spread([one, other]), np.array([[0, 0.5, 0]], np.float32))
    empty = segments([[0, 0, 0]], [], [])
    np.testing.assert_array_equal(TASKS["panoptic"].spread([empty]), np.zeros((1, 3), np.float32))


def test_a_task_need_not_measure_the_spread() -> None:
    assert Task.spread(TASKS["depth"], [np.zeros((2, 2))]) is None
