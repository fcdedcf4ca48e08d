"""What each built-in task makes of the predictions of tiles."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch

from tests.support.small import TASKS
from uvim_fsq.data.resize import resize_nearest
from uvim_fsq.data.tiles import Tiling
from uvim_fsq.errors import UserError
from uvim_fsq.tasks.base import Task
from uvim_fsq.tasks.imagenet_color.task import ImagenetColor, ImagenetColorConfig
from uvim_fsq.tasks.semantic_segmentation.task import SemanticSegmentation, SemanticSegmentationConfig

SIZE, SIDE = (60, 80), 16
IMAGE = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
TILES = Tiling(32).cover(*SIZE)


def test_depth_of_tiles_takes_its_scale_from_the_whole_picture() -> None:
    depth = 1 + 4 * np.mgrid[0:60, 0:80][1].astype(np.float32) / 80 + np.mgrid[0:60, 0:80][0].astype(np.float32) / 60
    rng = np.random.default_rng(0)
    parts = [(t, resize_nearest(rng.uniform(0.5, 2) * t.of(depth) - rng.uniform(0, 1), (SIDE, SIDE))) for t in TILES]
    found = TASKS["depth"].merge_tiles(resize_nearest(depth, (SIDE, SIDE)), parts, IMAGE)
    assert found.shape == SIZE and found.dtype == np.float32
    assert np.abs(found - depth).max() < 0.25 and np.abs(found - depth).mean() < 0.06


def test_merged_depth_stays_in_the_range_of_the_task() -> None:
    whole = np.tile(np.linspace(0, 10, SIDE, dtype=np.float32), (SIDE, 1))
    found = TASKS["depth"].merge_tiles(whole, [(t, -50 + whole) for t in TILES], IMAGE)
    assert found.min() >= 0 and found.max() <= 10


def segmentation(enlarge: Literal["nearest", "linear"]) -> SemanticSegmentation:
    classes = tuple((c, f"class {c}", "") for c in range(3))
    return SemanticSegmentation(SemanticSegmentationConfig(classes=classes, enlarge=enlarge))


@pytest.mark.parametrize("enlarge", ["nearest", "linear"])
def test_class_probabilities_of_tiles_are_blended(enlarge: Literal["nearest", "linear"]) -> None:
    task = segmentation(enlarge).tiled()
    truth = (np.mgrid[0:60, 0:80][1] * 3 // 80).astype(np.int64)
    # The first tile is unsure and says class 2 everywhere; where another one overlaps it, that one wins.
    logits = [torch.eye(3)[torch.from_numpy(resize_nearest(t.of(truth), (SIDE, SIDE)))] * 20 for t in TILES]
    logits[0] = torch.tensor([0.0, 0.0, 0.1]).expand(SIDE, SIDE, 3)
    items = task.decode({"classes": torch.stack(logits)})
    found = task.merge_tiles(items[0], list(zip(TILES, items, strict=True)), IMAGE)
    assert found.shape == SIZE and found.dtype == np.int32
    covered = np.zeros(SIZE, bool)
    for tile in TILES[1:]:
        tile.of(covered)[...] = True
    assert (found[~covered] == 2).all() and (found[covered] == truth[covered]).mean() > 0.93


@pytest.mark.parametrize("keep_luma", [False, True])
def test_colors_of_tiles_are_blended(keep_luma: bool) -> None:
    task = ImagenetColor(ImagenetColorConfig(keep_luma=keep_luma))
    color = np.full((SIDE, SIDE, 3), [0.5, -0.5, 0.0], np.float32)
    found = task.merge_tiles(color, [(t, color) for t in TILES], IMAGE)
    assert found.shape == (*SIZE, 3)
    np.testing.assert_allclose(found, task.to_size(color, IMAGE), atol=1e-5)


def test_panoptic_tiles_are_refused_with_the_reason() -> None:
    with pytest.raises(UserError, match="a segment that lies in two tiles has a number in each; predict without"):
        TASKS["panoptic"].tiled()


def test_a_task_refuses_tiles_unless_it_says_otherwise() -> None:
    with pytest.raises(UserError, match="cannot merge predictions of tiles; predict without --tiles"):
        Task.tiled(TASKS["depth"])


def test_equal_depths_have_equal_colors_in_all_frames_of_a_film() -> None:
    near, far = np.full((4, 4), 2.0, np.float32), np.full((4, 4), 2.0, np.float32)
    far[0, 0] = 9
    frames = [TASKS["depth"].film_frame(IMAGE[:4, :4], depth) for depth in (near, far)]
    assert np.array_equal(frames[0][1], frames[1][1]) and not np.array_equal(frames[0][0, 0], frames[1][0, 0])
