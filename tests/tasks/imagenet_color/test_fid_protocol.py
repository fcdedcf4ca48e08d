"""The FID protocols with a stand-in for the Inception network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import uvim_fsq.tasks.imagenet_color.data as photos
from tests.support.inception import FakeInception
from tests.support.photos import LUMA
from tests.support.photos import random_photo as photo
from tests.support.small import ORACLE
from uvim_fsq.checkpoints.loading import resolve
from uvim_fsq.commands.data_check import check_data
from uvim_fsq.config.schema import DataConfig
from uvim_fsq.data.transforms import JointTransform
from uvim_fsq.errors import UserError
from uvim_fsq.tasks.configuration import load_run
from uvim_fsq.tasks.imagenet_color.coltran import crop_and_resize, prediction_uint8
from uvim_fsq.tasks.imagenet_color.fid import Moments, frechet_distance
from uvim_fsq.tasks.imagenet_color.metrics import FIDMetric
from uvim_fsq.tasks.imagenet_color.task import ImagenetColor, ImagenetColorConfig
from uvim_fsq.training.run import train

RNG = np.random.default_rng(0)


def fid_task(protocol: Any = "fid", **options: Any) -> ImagenetColor:
    return ImagenetColor(ImagenetColorConfig(protocol=protocol, inception_weights="fake", **options))


def test_fid_view_is_the_cropped_area_resized_photo() -> None:
    sample, task = photo(600, 700), fid_task()
    view = task.evaluation_view(sample)
    np.testing.assert_array_equal(view.image, crop_and_resize(sample.image, 512))
    image, labels, kept = JointTransform(DataConfig(image_size=512), task, train=False)(sample, 0)
    np.testing.assert_array_equal(labels["color"], view.image.astype(np.float32) / 128 - 1)
    gray = labels["color"] @ LUMA.astype(np.float32)
    np.testing.assert_allclose(image, np.broadcast_to(gray, (3, 512, 512)), atol=1e-5)
    np.testing.assert_array_equal(kept.meta["photo"], sample.image)


def expected_fid(predictions: np.ndarray, reference: list[np.ndarray]) -> float:
    """The same FID computed independently: 256 x 256 integers, features of all images at once, moments, distance."""
    fake = FakeInception("", torch.device("cpu"))
    sets = [
        np.stack([prediction_uint8(p) for p in predictions]),
        np.stack([crop_and_resize(r, 256) for r in reference]),
    ]
    moments = [Moments(), Moments()]
    for one, images in zip(moments, sets, strict=True):
        one.add(fake.features(images))
    return frechet_distance(*moments)


@pytest.mark.slow
def test_fid_of_a_split_against_training_photos(root: Path, fake: list[tuple[int, ...]], own_cache: Path) -> None:
    task = fid_task()
    source = task.source(str(root), "val")
    samples = [task.evaluation_view(source[i]) for i in range(5)]
    predictions = RNG.uniform(-1, 1, (5, 64, 64, 3)).astype(np.float32)
    parts = [task.metric(source) for _ in range(3)]
    for i, sample in enumerate(samples):
        parts[0].update(predictions[i], sample)
        parts[1 + i % 2].update(predictions[i], sample)
    whole = parts[0].compute()
    train_photos = [photos.open_source(str(root), "train")[i].image for i in range(12)]
    assert whole["FID-5"] == pytest.approx(expected_fid(predictions, train_photos), rel=1e-9)
    assert whole["FID-5 of the real images"] < whole["FID-5"]
    assert whole["reference_images"] == 12 and whole["images"] == 5 and "psnr" in whole
    assert not [name for name in whole if "5k" in name]
    merged = task.metric(source)
    states = [part.state() for part in parts[1:]]
    merged.load_state({name: states[0][name] + states[1][name] for name in states[0]})
    assert merged.compute() == pytest.approx(whole, rel=1e-9)
    assert len(list(own_cache.glob("fid_reference-*.npz"))) == 1
    before = len(fake)
    again = task.metric(source)
    again.load_state(parts[0].state())
    assert again.compute() == whole and len(fake) == before  # the reference came from the cache


@pytest.mark.slow
def test_real_predictions_have_the_distance_of_the_real_images(root: Path, fake: list[tuple[int, ...]]) -> None:
    task = fid_task()
    source = task.source(str(root), "val")
    metric = task.metric(source)
    for i in range(5):
        sample = task.evaluation_view(source[i])
        # Resized to 512 and then to 256, which differs slightly from resizing directly to 256.
        metric.update(task.encode(sample)["color"], sample)
    figures = metric.compute()
    assert figures["FID-5"] == pytest.approx(figures["FID-5 of the real images"], rel=0.05)
    assert metric.protocol == "imagenet_color/fid" and figures["psnr"] == 100


@pytest.mark.slow
def test_only_the_full_coltran_lists_are_called_fid_5k(
    root: Path, fake: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    lists = {
        "coltran_evaluation": lambda: [f"ILSVRC2012_val_{i:08d}.JPEG" for i in (3, 1)],
        "coltran_reference": lambda: [f"ILSVRC2012_val_{i:08d}.JPEG" for i in (2, 5, 4)],
    }
    for name, names in lists.items():
        monkeypatch.setitem(photos.COLTRAN, name, names)
    task = fid_task("coltran")
    source = task.source(str(root), "val")
    assert [source[i].meta["name"] for i in range(2)] == lists["coltran_evaluation"]()
    metric = task.metric(source)
    assert isinstance(metric, FIDMetric) and metric.official
    for i in range(2):
        metric.update(np.zeros((16, 16, 3), np.float32), task.evaluation_view(source[i]))
    figures = metric.compute()
    assert figures["reference_images"] == 3 and "FID-2" in figures and "FID-5k" not in figures
    for i in range(2):
        metric.update(np.zeros((512, 512, 3), np.float32), task.evaluation_view(source[i]))
    assert not metric.official  # some predictions were smaller than 512
    train_split = task.source(str(root), "train")
    other = task.metric(train_split)
    assert isinstance(other, FIDMetric) and not other.official
    monkeypatch.undo()
    with pytest.raises(UserError, match="4999 of the 5000 photos|5000 of the 5000 photos|missing, the first is"):
        ImagenetColor(ImagenetColorConfig(protocol="coltran")).source(str(root), "val")


def test_missing_inception_weights_are_reported_before_training(root: Path, tmp_path: Path, own_cache: Path) -> None:
    section = {"task": {"name": "imagenet_color", "protocol": "fid"}}
    with pytest.raises(UserError, match="FID needs the Inception weights"):
        train(resolve(load_run({**ORACLE, **section}, [f"train.out={tmp_path / 'o'}", f"data.root={root}"])))
    assert not list((tmp_path / "o").glob("checkpoints/*"))
    lines, ok = check_data("imagenet_color", str(root), ["task.protocol=fid"])
    assert not ok and any("FID needs the Inception weights" in line for line in lines)
    (root / "train").rename(root / "elsewhere")
    task = fid_task()
    with pytest.raises(UserError, match="found elsewhere/ and val/, but no train/"):
        task.metric(task.source(str(root), "val"))


def test_impossible_fid_settings_are_refused(root: Path) -> None:
    task = ImagenetColor(ImagenetColorConfig(protocol="fid"))
    with pytest.raises(UserError, match=r"there is no file ''; download https://.* task.inception_weights=PATH"):
        task.metric(task.source(str(root), "val"))
    task = fid_task(fid_reference="val")
    with pytest.raises(UserError, match="fid_reference=val is the evaluation split itself"):
        task.metric(task.source(str(root), "val"))
