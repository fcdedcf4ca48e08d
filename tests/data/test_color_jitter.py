"""`data.color_jitter`: other colors of training photos, and of nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.cli import failure
from tests.support.small import ORACLE, oracle_run
from uvim_fsq.checkpoints.loading import build_task
from uvim_fsq.config.rules import validate
from uvim_fsq.config.schema import DataConfig
from uvim_fsq.data.loader import TrainLoader
from uvim_fsq.data.sample import Array, Sample
from uvim_fsq.data.transforms import JointTransform
from uvim_fsq.errors import UserError
from uvim_fsq.reports.data_page import _View
from uvim_fsq.tasks.configuration import load_run
from uvim_fsq.tasks.nyu_depth.config import NYUDepthConfig
from uvim_fsq.tasks.nyu_depth.task import NYUDepth

PLAIN = DataConfig(image_size=16)
JITTERED = replace(PLAIN, color_jitter=(0.4, 0.4, 0.4, 0.1))


class Maps(NYUDepth):
    """Passes its maps through; one has colors, which are labels here."""

    linear_maps = ("colors",)

    def encode(self, sample: Sample) -> dict[str, Array]:
        return sample.maps


TASK = Maps(NYUDepthConfig(protocol="full"))


def sample() -> Sample:
    rng = np.random.default_rng(0)
    maps = {"depth": rng.random((24, 32), np.float32), "colors": rng.random((24, 32, 3), np.float32)}
    return Sample("a", rng.integers(0, 256, (24, 32, 3), dtype=np.uint8), maps)


def prepared(data: DataConfig, seed: int, *, train: bool = True) -> tuple[Array, dict[str, Array]]:
    image, maps, _ = JointTransform(data, TASK, train=train)(sample(), seed)
    return image, maps


def test_only_the_photo_changes_and_crop_and_flip_stay() -> None:
    for seed in range(4):
        (image, maps), (changed, same) = prepared(PLAIN, seed), prepared(JITTERED, seed)
        assert changed.dtype == np.uint8 and changed.shape == image.shape and not np.array_equal(image, changed)
        assert maps.keys() == same.keys()
        for name, values in maps.items():
            np.testing.assert_array_equal(values, same[name])
        # The geometry of the photo is the same too: only its colors differ.
        assert np.corrcoef(image.astype(float).ravel(), changed.astype(float).ravel())[0, 1] > 0.8


def test_without_variation_nothing_changes() -> None:
    (image, _), (same, _) = prepared(PLAIN, 3), prepared(replace(PLAIN, color_jitter=(0, 0, 0, 0)), 3)
    np.testing.assert_array_equal(image, same)


def test_each_kind_of_variation_does_what_it_says() -> None:
    gray = np.full((16, 16, 3), 100, np.uint8)

    def means(image: Array, *jitter: float) -> Array:
        whole = replace(PLAIN, crop="none", hflip=False, color_jitter=jitter)
        transform = JointTransform(whole, TASK, train=True)
        return np.array([transform(Sample("a", image), seed)[0].mean((1, 2)) for seed in range(30)])

    brightness = means(gray, 0.4, 0, 0, 0)
    assert 60 <= brightness.min() < 75 and 125 < brightness.max() <= 140
    # Gray has neither contrast nor colors; rounding takes 1.
    assert set(means(gray, 0, 0.4, 0.4, 0.5).ravel()) <= {99, 100}
    red = gray * np.array([2, 0, 0], np.uint8)
    assert len(np.unique(means(red, 0, 0, 0, 0.5).argmax(1))) == 3


def test_colors_depend_on_the_seed_alone() -> None:
    one, again, other = (prepared(JITTERED, seed)[0] for seed in (5, 5, 6))
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)


def test_evaluation_and_prediction_see_the_true_colors() -> None:
    image, _ = prepared(JITTERED, 1, train=False)
    np.testing.assert_array_equal(image, prepared(PLAIN, 1, train=False)[0])
    np.testing.assert_array_equal(image, JointTransform(JITTERED, TASK, train=False).picture(sample().image))


def test_a_resumed_training_sees_the_colors_of_one_that_was_not_stopped(data: Path) -> None:
    run = oracle_run(Path("x"), data, "data.color_jitter=[0.4,0.4,0.4,0.1]")
    task = build_task(run)

    def batches(first: int, data_config: DataConfig = run.data) -> list[Any]:
        loader = TrainLoader(task.source(str(data), "train"), task, data_config, batch_size=8, seed=3)
        return list(loader.batches(first, 5))

    for one, other in zip(batches(0)[2:], batches(2), strict=True):
        assert torch.equal(one["image"], other["image"])
    plain, jittered = batches(4, replace(run.data, color_jitter=None)), batches(4)
    assert plain[0]["id"] == jittered[0]["id"] and not torch.equal(plain[0]["image"], jittered[0]["image"])
    assert torch.equal(plain[0]["labels"]["depth"], jittered[0]["labels"]["depth"])


def test_a_task_whose_labels_are_the_colors_refuses_it(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    setting = "data.color_jitter=[0.1,0.1,0.1,0]"
    said = failure(capsys, "data", "view", data, "--task", "imagenet_color", setting, "--out", tmp_path / "page.html")
    assert "data.color_jitter=[0.1, 0.1, 0.1, 0.0]: the labels of imagenet_color are the colors of the photo" in said
    run = oracle_run(Path("x"), data, setting)
    build_task(run)
    monkeypatch.setattr(NYUDepth, "labels_are_colors", True)
    with pytest.raises(UserError, match="the labels of nyu_depth are the colors of the photo"):
        build_task(run)


@pytest.mark.parametrize(
    "value", ["[-0.1,0,0,0]", "[0,0,0,0.6]", "[0,.inf,0,0]", "[0,0,.nan,0]", "[0.1,0.1,0.1]", "0.4"]
)
def test_impossible_variations_are_refused(value: str) -> None:
    with pytest.raises(UserError, match="data.color_jitter"):
        validate(load_run(ORACLE, ["train.out=x", f"data.color_jitter={value}"]))


def test_the_page_of_a_data_set_shows_it(data: Path) -> None:
    run = oracle_run(Path("x"), data)
    task = build_task(run)
    first = task.source(str(data), "train")[0]
    plain, jittered = (_View(task, x).row(first, 0) for x in (run.data, replace(run.data, color_jitter=(0.9, 0, 0, 0))))
    for title, panel in plain.items():
        same = np.array_equal(panel.picture, jittered[title].picture)
        assert same == ("augmented" not in title), title
