"""Moments, the Frechet distance and the Inception features."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch

from uvim_fsq.errors import UserError
from uvim_fsq.tasks.imagenet_color import fid
from uvim_fsq.tasks.imagenet_color.fid import Inception, Moments, fid_name, frechet_distance

RNG = np.random.default_rng(0)


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


def test_distance_of_known_gaussians() -> None:
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


def test_distance_of_constant_features() -> None:
    a, b = moments_of(np.zeros((5, 8))), moments_of(np.full((3, 8), 0.5))
    assert abs(frechet_distance(a, b) - 2.0) < 1e-12


@pytest.mark.parametrize(("first", "second"), [(400, 300), (400, 30), (30, 20)])
def test_distance_is_symmetric_and_equals_the_matrix_root(first: int, second: int) -> None:
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
    # The matrix root is less accurate for singular covariances.
    assert abs(distance - expected) < (1e-9 if second > 64 else 1e-4) * expected


def test_moments_add_up_over_batches_and_processes() -> None:
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
def test_fewer_than_two_images_are_refused(count: int) -> None:
    few = moments_of(np.ones((count, 4)))
    with pytest.raises(UserError, match="at least 2 images"):
        frechet_distance(few, moments_of(RNG.random((5, 4))))


def test_the_name_of_the_metric_states_the_number_of_images() -> None:
    assert fid_name(5000, 5000, True) == "FID-5k"
    assert fid_name(5000, 5000, False) == fid_name(5000, 300, True) == "FID-5000"
    assert fid_name(300, 5000, True) == "FID-300"


def test_missing_or_wrong_inception_weights_are_one_line(tmp_path: Path) -> None:
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


@pytest.mark.slow
def test_inception_features_equal_the_networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With random weights; their hash replaces the published one."""
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")

    class Unloaded(module.FeatureExtractorInceptionV3):
        def load_state_dict(self, *args: object, **kwargs: object) -> None:
            pass

    path = tmp_path / "weights.pth"
    torch.save({}, path)
    torch.manual_seed(0)
    network = Unloaded("fid", ["2048"], feature_extractor_weights_path=path)
    for name, value in network.state_dict().items():
        if name.endswith("conv.weight"):  # He initialization, so that the features are of order 1
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
