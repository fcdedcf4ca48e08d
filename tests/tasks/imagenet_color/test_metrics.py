"""PSNR and FID against values computed by hand, on small sets with few features."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.support.photos import LUMA
from uvim_fsq.data.resize import resize_linear
from uvim_fsq.data.sample import Sample
from uvim_fsq.errors import UserError
from uvim_fsq.tasks.imagenet_color import distances, metrics
from uvim_fsq.tasks.imagenet_color.coltran import crop_and_resize, prediction_uint8
from uvim_fsq.tasks.imagenet_color.data import open_source
from uvim_fsq.tasks.imagenet_color.distances import FeatureDistance, reference_moments
from uvim_fsq.tasks.imagenet_color.fid import Moments, frechet_distance
from uvim_fsq.tasks.imagenet_color.metrics import COLORFULNESS, FIDMetric, PSNRMetric, keep_luma, to_unit

RNG = np.random.default_rng(5)
FEATURES = 6


class Corners:
    """Mean colors of the upper and lower half: 6 features instead of 2,048. `batches`: the size of each batch."""

    name, dim, sha256 = "corners", FEATURES, "corners"

    def __init__(self) -> None:
        self.batches: list[int] = []

    def features(self, images: np.ndarray) -> np.ndarray:
        assert images.dtype == np.uint8 and images.shape[1:] == (256, 256, 3)
        self.batches.append(len(images))
        return np.concatenate([images[:, :128].mean((1, 2)), images[:, 128:].mean((1, 2))], 1) / 64


def moments_of(images: list[np.ndarray]) -> Moments:
    moments = Moments(FEATURES)
    moments.add(Corners().features(np.stack(images)))
    return moments


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(distances, "BATCH", 2)
    monkeypatch.setenv("UVIM_FSQ_CACHE", str(tmp_path / "cache"))


def photo(height: int = 20, width: int = 30) -> np.ndarray:
    """Noise of a random color, so that photos differ in their means."""
    return (RNG.integers(0, 256, (height, width, 3)) * RNG.random(3)).astype(np.uint8)


def view(whole: np.ndarray, side: int = 16) -> Sample:
    """A photo as the FID protocols evaluate it."""
    return Sample("x", crop_and_resize(whole, side), {}, {"scale": 128.0, "photo": whole})


class Photos:
    """A reference set in memory."""

    def __init__(self, photos: list[np.ndarray]) -> None:
        self.photos, self.root, self.names, self.reads = photos, Path("nowhere"), list(map(str, photos)), 0
        self.info = {"split": "train"}

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, index: int) -> Sample:
        self.reads += 1
        return Sample("x", self.photos[index])


def fid_metric(luma: bool = False, official: bool = False, photos: Any = None) -> tuple[FIDMetric, Corners]:
    network = Corners()
    reference: Any = photos or Photos([photo() for _ in range(4)])
    return FIDMetric(PSNRMetric("p", luma), FeatureDistance(reference, network, "crop"), official), network


def test_pixels_are_scaled_by_the_protocol() -> None:
    image = np.array([[[0, 51, 255]]], np.uint8)
    plain, coltran = to_unit(image, Sample("x", image)), to_unit(image, Sample("x", image, {}, {"scale": 128.0}))
    np.testing.assert_allclose(plain, [[[-1, -0.6, 1]]], atol=1e-6)
    np.testing.assert_array_equal(coltran, [[[-1, 51 / 128 - 1, 127 / 128]]])
    assert plain.dtype == coltran.dtype == np.float32


def test_psnr_is_at_the_predictions_size_and_adds_up() -> None:
    first, second, whole = (PSNRMetric("protocol", luma=False) for _ in range(3))
    expected = []
    for i in range(5):
        image, prediction = photo(), RNG.uniform(-1, 1, (10, 12, 3)).astype(np.float32)
        row = whole.update(prediction, Sample("x", image))
        (first, second)[i % 2].update(prediction, Sample("x", image))
        error = np.mean((prediction - (resize_linear(image, (10, 12)) / 127.5 - 1)) ** 2)
        assert row["psnr"] == pytest.approx(10 * np.log10(4 / error), rel=1e-5)
        assert row["mse"] == pytest.approx(error, rel=1e-5)
        expected.append((row["psnr"], row["mse"]))
    psnr, mse = np.mean(expected, 0)
    figures = whole.compute()
    assert [figures["psnr"], figures["mse"], figures["images"]] == pytest.approx([psnr, mse, 5], rel=1e-12)
    state = first.state()
    first.update(prediction, Sample("x", image))
    merged = PSNRMetric("protocol", luma=False)
    merged.load_state({name: value + second.state()[name] for name, value in state.items()})
    assert merged.compute() == pytest.approx(whole.compute(), rel=1e-12) and merged.protocol == "protocol"
    with pytest.raises(UserError, match="no image was evaluated"):
        PSNRMetric("p", luma=False).compute()


def test_psnr_of_equal_and_nearly_equal_pictures() -> None:
    image = np.full((2, 2, 3), 255, np.uint8)
    metric = PSNRMetric("p", luma=False)
    equal = metric.update(np.ones((2, 2, 3)), Sample("x", image))
    assert equal["psnr"] == pytest.approx(100, abs=1e-9) and equal["mse"] == 0
    assert metric.compute()["images"] == 1
    near = metric.update(np.full((2, 2, 3), 1 - 2**-15), Sample("x", image))  # just above the smallest error
    assert [near["psnr"], near["mse"]] == pytest.approx([10 * np.log10(2**32), 2**-30])


def test_keep_luma_takes_the_brightness_of_the_photo() -> None:
    image, prediction = np.zeros((1, 1, 3), np.float32), np.array([[[0.5, 0.0, -0.25]]], np.float32)
    shift = -(prediction @ LUMA) / LUMA.sum()
    np.testing.assert_allclose(keep_luma(prediction, image), prediction + shift[..., None], atol=1e-6)
    high, low = keep_luma(prediction, image + 1), keep_luma(prediction, image - 1)
    assert high.max() == 1 and low.min() == -1 and high.min() > 0 > low.max()
    metric = PSNRMetric("p", luma=True)
    own = Sample("x", np.full((1, 1, 3), 127, np.uint8))
    truth = to_unit(own.image, own)
    row = metric.update(prediction, own)
    assert row["mse"] == pytest.approx(np.mean((keep_luma(prediction, truth) - truth) ** 2), rel=1e-6)


@pytest.mark.parametrize("luma", [False, True])
def test_fid_equals_a_computation_by_hand(luma: bool) -> None:
    """Five images in batches of two; predictions and photos are resized to 256 in their own ways."""
    reference = Photos([photo() for _ in range(4)])
    metric, inception = fid_metric(luma, photos=reference)
    images, predictions = [photo() for _ in range(5)], RNG.uniform(-1, 1, (5, 8, 8, 3)) * RNG.random((5, 1, 1, 3))
    psnr = PSNRMetric("p", luma)
    for i, (image, prediction) in enumerate(zip(images, predictions, strict=True)):
        row, alone = metric.update(prediction, view(image)), psnr.update(prediction, view(image))
        assert (row["psnr"], row["mse"]) == (alone["psnr"], alone["mse"])
        assert inception.batches == [2, 2] * ((i + 1) // 2)
    assert not reference.reads  # only when it is needed
    figures = metric.compute()
    assert inception.batches == [2, 2, 2, 2, 1, 1, 2, 2] and not any(metric.inception.waiting.values())
    shown = [p.astype(np.float32) for p in predictions]
    if luma:
        views = [view(image) for image in images]
        shown = [keep_luma(p, to_unit(resize_linear(v.image, (8, 8)), v)) for p, v in zip(shown, views, strict=True)]
    known = moments_of([crop_and_resize(image, 256) for image in reference.photos])
    sets = [prediction_uint8(p, 256) for p in shown], [crop_and_resize(image, 256) for image in images]
    fids = [frechet_distance(moments_of(pictures), known) for pictures in sets]
    assert [figures["FID-5"], figures["FID-5 of the real images"]] == pytest.approx(fids, rel=1e-9)
    assert figures["reference_images"] == 4 and figures["psnr"] == psnr.compute()["psnr"]
    colors = [np.mean([metrics.colorfulness(picture) for picture in pictures]) for pictures in sets]
    assert [figures[name] for name in COLORFULNESS] == pytest.approx(colors, rel=1e-12)
    assert min(figures["FID-5"], figures["FID-5 of the real images"]) > 0.1


def test_metric_states_of_several_processes_add_up() -> None:
    reference, images = Photos([photo() for _ in range(4)]), [photo() for _ in range(5)]
    parts = [fid_metric(photos=reference)[0] for _ in range(3)]
    for i, image in enumerate(images):
        prediction = RNG.uniform(-1, 1, (8, 8, 3))
        for metric in (parts[0], parts[1 + i % 2]):
            metric.update(prediction, view(image))
    states = [part.state() for part in parts[1:]]
    merged = fid_metric(photos=reference)[0]
    merged.update(prediction, view(image))  # load_state replaces it, also what is still waiting
    merged.load_state({name: states[0][name] + states[1][name] for name in states[0]})
    assert merged.compute() == pytest.approx(parts[0].compute(), rel=1e-9)
    assert merged.compute()["images"] == 5


def test_fid_5k_is_reserved_for_the_official_lists_at_512(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    monkeypatch.setattr(metrics, "fid_name", lambda *arguments: given.append(arguments) or "FID")
    for official, sides in ((True, (512, 512)), (True, (512, 256)), (True, (256, 512)), (False, (512, 512))):
        metric, _ = fid_metric(official=official)
        for side in sides:
            metric.update(np.zeros((side, side, 3), np.float32), view(photo()))
        metric.compute()
    assert given == [(2, 4, True), (2, 4, False), (2, 4, False), (2, 4, False)]


def test_reference_moments_are_cached_until_weights_or_photos_change(tmp_path: Path) -> None:
    """Also: features are computed in batches, and a missing photo is named."""
    for split, count in (("train", 5), ("val", 1)):
        (tmp_path / "photos" / split).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(photo()).save(tmp_path / "photos" / split / f"{i}.png")
    source, inception = open_source(str(tmp_path / "photos"), "train"), Corners()
    given: Any = inception
    found = reference_moments(source, given, 256, "crop")
    whole = moments_of([crop_and_resize(source[i].image, 256) for i in range(5)])
    np.testing.assert_allclose(found.mean, whole.mean)
    np.testing.assert_allclose(found.covariance, whole.covariance)
    assert inception.batches == [2, 2, 1] and found.count == 5
    np.testing.assert_allclose(reference_moments(source, given, 256, "crop").mean, whole.mean)
    assert len(inception.batches) == 3  # from the cache
    inception.sha256 = "other weights"
    reference_moments(source, given, 256, "crop")
    assert len(inception.batches) == 6
    os.utime(tmp_path / "photos" / "train" / "0.png", ns=(1, 1))
    reference_moments(source, given, 256, "crop")
    assert len(inception.batches) == 9
    (tmp_path / "photos" / "train" / "4.png").unlink()
    with pytest.raises(UserError, match="4.png"):
        reference_moments(source, given, 256, "crop")
