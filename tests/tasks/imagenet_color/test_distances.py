"""Colorfulness, and the Fréchet distance in the features of a named network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from uvim_fsq.data.resize import resize_linear
from uvim_fsq.data.sample import Sample
from uvim_fsq.tasks.imagenet_color import distances
from uvim_fsq.tasks.imagenet_color.data import PhotoSource, open_source
from uvim_fsq.tasks.imagenet_color.distances import FeatureDistance
from uvim_fsq.tasks.imagenet_color.fid import Moments, frechet_distance
from uvim_fsq.tasks.imagenet_color.metrics import PSNRMetric, colorfulness, to_unit

RNG = np.random.default_rng(3)
SIDE = 8


class Means:
    """Mean colors instead of features, of pictures of any size; `shapes`: those of each batch."""

    name, dim, sha256 = "means", 3, "0123"

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def features(self, images: np.ndarray) -> np.ndarray:
        self.shapes.append(images.shape)
        return images.mean((1, 2)) / 64


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PhotoSource:
    """A training split of six photos of 8 x 12 pixels."""
    monkeypatch.setenv("UVIM_FSQ_CACHE", str(tmp_path / "cache"))
    for split, count in (("train", 6), ("val", 1)):
        (tmp_path / "photos" / split).mkdir(parents=True)
        for i in range(count):
            pixels = RNG.integers(0, 256, (8, 12, 3)) * RNG.random(3)
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "photos" / split / f"{i}.png")
    return open_source(str(tmp_path / "photos"), "train")


def metric(photos: PhotoSource, limit: int = 0) -> PSNRMetric:
    return PSNRMetric("p", False, FeatureDistance(photos, Means(), "resize", limit))


def predictions(count: int) -> list[tuple[np.ndarray, Sample]]:
    """Random predictions of side 8, with photos of another size."""
    return [
        (RNG.uniform(-1, 1, (SIDE, SIDE, 3)) * RNG.random(3), Sample("x", RNG.integers(0, 256, (10, 14, 3), np.uint8)))
        for _ in range(count)
    ]


def fed(photos: PhotoSource, items: list[tuple[np.ndarray, Sample]]) -> PSNRMetric:
    result = metric(photos)
    for prediction, sample in items:
        result.update(prediction, sample)
    return result


def test_colorfulness_equals_a_value_computed_by_hand() -> None:
    """Red and blue pixels: rg = (255, 0) and yb = (127.5, -255)."""
    image = np.array([[[255, 0, 0], [0, 0, 255]]], np.uint8)
    deviation = (127.5**2 + 191.25**2) ** 0.5
    mean = (127.5**2 + 63.75**2) ** 0.5
    assert colorfulness(image) == pytest.approx(deviation + 0.3 * mean, rel=1e-12)
    assert colorfulness(np.full((3, 5, 3), 200, np.uint8)) == 0


def test_colorfulness_of_predictions_and_photos_are_means_over_images(photos: PhotoSource) -> None:
    red, gray = np.array([[[1, -1, -1]]], np.float32), np.zeros((1, 1, 3), np.float32)
    shown = fed(photos, [(red, Sample("a", np.zeros((1, 1, 3), np.uint8))) for _ in range(2)])
    row = shown.update(gray, Sample("b", np.array([[[0, 0, 255]]], np.uint8)))
    one = 0.3 * (255**2 + 127.5**2) ** 0.5, 0.3 * 255
    assert row["colorfulness"] == 0 and row["colorfulness of the photos"] == pytest.approx(one[1])
    figures = PSNRMetric("p", False)
    figures.load_state({"sums": shown.sums})
    assert figures.compute()["colorfulness"] == pytest.approx(2 / 3 * one[0])
    assert figures.compute()["colorfulness of the photos"] == pytest.approx(one[1] / 3)


def test_the_distance_of_a_set_to_itself_is_zero(photos: PhotoSource) -> None:
    items = [resize_linear(photos[i].image, (SIDE, SIDE)) for i in range(6)]
    figures = fed(photos, [(to_unit(item, Sample("x", item)), photos[i]) for i, item in enumerate(items)]).compute()
    assert 0 <= figures["fd_means"] < 1e-9 and 0 <= figures["fd_means of the real images"] < 1e-9


def test_the_distance_is_named_after_its_features(photos: PhotoSource) -> None:
    shown = fed(photos, predictions(3))
    names = {name for name in shown.compute() if name.lower().startswith(("fd", "fid"))}
    assert names == {"fd_means", "fd_means of the real images", "fd_means reference images"}
    assert shown.details == {
        "fd_means": {
            "network": "means",
            "weights_sha256": "0123",
            "features": 3,
            "reference_split": "train",
            "reference_images": 6,
        }
    }


def test_the_distance_does_not_depend_on_the_batch(photos: PhotoSource, monkeypatch: pytest.MonkeyPatch) -> None:
    items, figures = predictions(7), []
    for batch in (1, 3, 50):
        monkeypatch.setattr(distances, "BATCH", batch)
        figures.append(fed(photos, items).compute())
    assert figures[0] == pytest.approx(figures[1], rel=1e-9) and figures[0] == pytest.approx(figures[2], rel=1e-9)


def test_the_distance_does_not_depend_on_the_number_of_processes(photos: PhotoSource) -> None:
    """Also where a process has no image, and so has not seen their size."""
    items = predictions(5)
    whole = fed(photos, items).compute()
    states = [fed(photos, part).state() for part in (items[::2], items[1::2], [])]
    merged = metric(photos)
    merged.load_state({name: np.sum([state[name] for state in states], 0) for name in states[0]})
    assert merged.compute() == pytest.approx(whole, rel=1e-9)


def test_reference_photos_have_the_size_of_the_predictions_and_are_evenly_spaced(photos: PhotoSource) -> None:
    shown = metric(photos, limit=3)
    for prediction, sample in predictions(4):
        shown.update(prediction, sample)
    figures = shown.compute()
    assert shown.distance is not None
    network: Any = shown.distance.network
    assert network.shapes == [(4, SIDE, SIDE, 3), (4, SIDE, SIDE, 3), (3, SIDE, SIDE, 3)]
    assert figures["fd_means reference images"] == 3
    known = Moments(3)
    chosen = [resize_linear(photos[i].image, (SIDE, SIDE)) for i in (0, 2, 5)]
    known.add(Means().features(np.stack(chosen)))
    expected = frechet_distance(shown.distance.moments["prediction"], known)
    assert figures["fd_means"] == pytest.approx(expected, rel=1e-9)
