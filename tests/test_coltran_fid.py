"""Colour's parts: ColTran's lists and resizing, moments and Frechet distance."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch

from tests.support.golden import golden
from uvim_fsq.errors import UserError
from uvim_fsq.tasks.imagenet_color import fid
from uvim_fsq.tasks.imagenet_color.coltran import (
    area_resize,
    crop_and_resize,
    evaluation_names,
    prediction_uint8,
    reference_names,
    write_lists,
)
from uvim_fsq.tasks.imagenet_color.fid import Inception, Moments, fid_name, frechet_distance

RNG = np.random.default_rng(0)


# ColTran: lists and resizing


def test_lists(tmp_path: Path) -> None:
    digests = [hashlib.sha256("\n".join(names()).encode()).hexdigest() for names in (evaluation_names, reference_names)]
    assert digests == [
        "b0627a4677d206b64905ec4d70760f50f7b09363f65e624957c3d1cccb49eb89",
        "3d59b1214977c0021158d4264b3b18e4af1ff71cd24d22f6bedd39f57658f172",
    ]
    written = write_lists(tmp_path / "lists")
    assert [path.name for path in written] == ["coltran_evaluation.txt", "coltran_reference.txt"]
    assert [path.read_text().splitlines() for path in written] == [evaluation_names(), reference_names()]


def test_coltran_golden() -> None:
    numbers = golden("pipeline.npz")
    for size in (64, 32):
        resized = crop_and_resize(numbers["coltran/in"], size)
        assert resized.dtype == np.uint8
        np.testing.assert_array_equal(resized, numbers[f"coltran/area_{size}"])
    levels = prediction_uint8(numbers["coltran/pred_in"][0], 32)
    assert levels.dtype == np.uint8
    np.testing.assert_array_equal(levels, numbers["coltran/pred_uint8"][0])
    np.testing.assert_array_equal(levels.astype(np.float32) / 128 - 1, numbers["coltran/pred_normalized"][0])


@pytest.mark.parametrize(("size", "new"), [(12, 6), (12, 4), (12, 5), (7, 12), (5, 5), (30, 7), (1, 3), (9, 1)])
def test_area_resize_properties(size: int, new: int) -> None:
    np.testing.assert_allclose(area_resize(np.full((size, size, 3), 37, np.uint8), new), 37, rtol=1e-14)
    image = RNG.uniform(-1, 1, (size, size, 3))
    resized = area_resize(image, new)
    assert resized.shape == (new, new, 3)
    np.testing.assert_allclose(resized.mean((0, 1)), image.mean((0, 1)), atol=1e-14)  # every pixel counts alike
    # The integral of a step function, by brute force: as many copies of every pixel as make the factor an integer.
    fine = image.repeat(new, 0).repeat(new, 1).reshape(new, size, new, size, 3).mean((1, 3))
    np.testing.assert_allclose(resized, fine, atol=1e-14)


def test_area_resize_by_two_is_the_box_mean() -> None:
    image = RNG.integers(0, 256, (16, 16, 3), dtype=np.uint8)
    mean = image.reshape(8, 2, 8, 2, 3).mean((1, 3))
    np.testing.assert_array_equal(area_resize(image, 8), mean)
    assert (mean % 1 == 0.5).any()
    np.testing.assert_array_equal(crop_and_resize(image, 8), np.rint(mean))  # halves to even


def test_crop_drops_the_last_line_of_an_odd_remainder() -> None:
    image = np.arange(5 * 8 * 3, dtype=np.uint8).reshape(5, 8, 3)
    np.testing.assert_array_equal(crop_and_resize(image, 5), image[:, 1:6])
    np.testing.assert_array_equal(crop_and_resize(image.transpose(1, 0, 2), 5), image[:, 1:6].transpose(1, 0, 2))


def test_prediction_levels() -> None:
    y = np.array([-1, -1 + 0.5 / 128, -1 + 1.5 / 128, 0, 1, 1.5, -7, np.nan, np.inf], np.float32)
    image = np.broadcast_to(y[:, None, None], (9, 9, 3))
    np.testing.assert_array_equal(prediction_uint8(image, 9)[:, 0, 0], [0, 0, 2, 128, 255, 255, 0, 128, 255])


# FID


def moments_of(features: np.ndarray) -> Moments:
    moments = Moments(features.shape[1])
    moments.add(features)
    return moments


def gaussian(mean: np.ndarray, covariance: np.ndarray, count: int = 1000) -> Moments:
    """Moments of a set that has exactly this mean and covariance."""
    moments = Moments(len(mean))
    outer = (count - 1) * covariance + count * np.outer(mean, mean)
    moments.load_state({"count": np.array([float(count)]), "sum": count * mean, "outer": outer})
    return moments


def correlated(count: int, dim: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.abs(rng.standard_normal((count, dim)) @ rng.standard_normal((dim, dim))) / dim**0.5 + rng.random(dim)


def test_known_gaussians() -> None:
    mean_a, mean_b = RNG.standard_normal((2, 32))
    a, b = RNG.uniform(0.1, 4, (2, 32))
    expected = np.square(mean_a - mean_b).sum() + np.square(np.sqrt(a) - np.sqrt(b)).sum()
    distance = frechet_distance(gaussian(mean_a, np.diag(a)), gaussian(mean_b, np.diag(b), 500))
    assert abs(distance - expected) < 1e-9 * expected
    turn = np.linalg.qr(RNG.standard_normal((32, 32)))[0]  # commuting covariances, not diagonal
    both = [gaussian(mean, turn @ np.diag(v) @ turn.T) for mean, v in ((mean_a, a), (mean_b, b))]
    assert abs(frechet_distance(*both) - expected) < 1e-9 * expected


@pytest.mark.parametrize("count", [500, 20, 2])
def test_distance_to_itself_is_zero(count: int) -> None:
    features = correlated(count, 64, 1)
    assert 0 <= frechet_distance(moments_of(features), moments_of(features)) < 1e-6


def test_constant_features() -> None:
    a, b = moments_of(np.zeros((5, 8))), moments_of(np.full((3, 8), 0.5))
    assert abs(frechet_distance(a, b) - 2.0) < 1e-12


@pytest.mark.parametrize(("first", "second"), [(400, 300), (400, 30), (30, 20)])
def test_symmetric_and_equal_to_the_matrix_root(first: int, second: int) -> None:
    x, y = correlated(first, 64, 2), correlated(second, 64, 3)
    a, b = moments_of(x), moments_of(y)
    distance = frechet_distance(a, b)
    assert abs(distance - frechet_distance(b, a)) < 1e-5 * distance
    covariances = [np.cov(features, rowvar=False) for features in (x, y)]
    np.testing.assert_allclose(a.covariance, covariances[0], atol=1e-12)
    np.testing.assert_allclose(a.mean, x.mean(0), atol=1e-14)
    root = np.real(np.asarray(scipy.linalg.sqrtm(covariances[0] @ covariances[1])))
    trace = np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * np.trace(root)
    expected = np.square(x.mean(0) - y.mean(0)).sum() + trace
    # The matrix root loses digits where the covariances are singular.
    assert abs(distance - expected) < (1e-9 if second > 64 else 1e-4) * expected


def test_moments_may_be_cut_up() -> None:
    features = correlated(1200, 16, 4)
    whole, parts = moments_of(features), [Moments(16), Moments(16)]
    for start in range(0, 1200, 7):
        parts[start % 2].add(features[start : start + 7])
    assert whole.count == sum(part.count for part in parts) == 1200
    merged = Moments(16)
    merged.add(features[:5])
    merged.load_state({key: value + parts[1].state()[key] for key, value in parts[0].state().items()})
    assert merged.count == 1200 and all(v.dtype == np.float64 for v in merged.state().values())
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-13)
    np.testing.assert_allclose(merged.covariance, whole.covariance, rtol=1e-10)
    single = Moments(16)
    single.add(features[:1].astype(np.float32))
    assert single.state()["sum"].dtype == np.float64


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_images(count: int) -> None:
    few = moments_of(np.ones((count, 4)))
    with pytest.raises(UserError, match="at least 2 images"):
        frechet_distance(few, moments_of(RNG.random((5, 4))))


def test_names_of_the_figure() -> None:
    assert fid_name(5000, 5000, True) == "FID-5k"
    assert fid_name(5000, 5000, False) == fid_name(5000, 300, True) == "FID-5000"
    assert fid_name(300, 5000, True) == "FID-300"


def test_inception_errors(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.pth"
    wrong.write_bytes(b"something else")
    for path, what in (
        ("", "there is no file ''"),
        (tmp_path / "no.pth", "no.pth"),
        (wrong, "wrong.pth is not"),
        (tmp_path, "no file"),
    ):
        with pytest.raises(UserError) as error:
            Inception(path, torch.device("cpu"))
        text = str(error.value)
        assert what in text and "\n" not in text and "task.inception_weights=PATH" in text
        assert (
            "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
            "weights-inception-2015-12-05-6726825d.pth" in text
        )


def test_inception_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights in a file whose hash is taken for the published one."""
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")

    class Unloaded(module.FeatureExtractorInceptionV3):
        def load_state_dict(self, *args: object, **kwargs: object) -> None:
            pass

    path = tmp_path / "weights.pth"
    torch.save({}, path)
    torch.manual_seed(0)
    network = Unloaded("fid", ["2048"], feature_extractor_weights_path=path)
    for name, value in network.state_dict().items():
        if name.endswith("conv.weight"):  # He's scale, so that the features are of order 1
            value.normal_(0, (2 / value[0].numel()) ** 0.5)
    torch.save(network.state_dict(), path)
    monkeypatch.setattr(fid, "WEIGHTS_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    inception = Inception(path, torch.device("cpu"))
    images = RNG.integers(0, 256, (2, 64, 48, 3), dtype=np.uint8)
    with torch.autocast("cpu", torch.bfloat16):
        features = inception.features(images)
    assert features.shape == (2, 2048) and features.dtype == np.float64 and 0.01 < features.std() < 100
    with torch.inference_mode():
        (expected,) = network(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    np.testing.assert_allclose(features, expected.double().numpy(), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(inception.features(images[1:2])[0], features[1], rtol=1e-3, atol=1e-5)
