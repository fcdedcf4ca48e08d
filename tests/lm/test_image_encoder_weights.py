"""Weights files that do not fit."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from uvim_fsq.config.schema import EncoderConfig
from uvim_fsq.errors import UserError
from uvim_fsq.lm.image_encoder import build_image_encoder


class Code:
    """An object whose unpickling runs a shell command."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.slow
def test_unusable_weights_files_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "vit_tiny_patch16_224"

    def message(weights: object) -> str:
        with pytest.raises(UserError) as caught:
            build_image_encoder(EncoderConfig(name=name, weights=str(weights)), 224)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "no such file; give hub, package or a weights file" in message(tmp_path / "none.safetensors")
    torch.save({"a": torch.zeros(3)}, tmp_path / "other.pth")
    assert f"does not contain weights of model.encoder.name={name} (its arrays belong to a different" in message(
        tmp_path / "other.pth"
    )
    torch.save({"a": Code(tmp_path / "mark")}, tmp_path / "code.pth")
    assert "contains pickled Python objects, which are never loaded" in message(tmp_path / "code.pth")
    assert not (tmp_path / "mark").exists()
    (tmp_path / "text.npz").write_text("no zip")
    assert "text.npz is truncated or not an .npz" in message(tmp_path / "text.npz")
    np.savez_compressed(tmp_path / "bomb.npz", a=np.zeros(30_000_000, np.float32))
    assert "would unpack to 120000" in message(tmp_path / "bomb.npz")

    def offline() -> None:
        raise OSError("We cannot reach the Hub\nTraceback of the client")

    import timm

    real = timm.create_model
    monkeypatch.setattr(
        timm, "create_model", lambda *a, pretrained=False, **k: offline() if pretrained else real(*a, **k)
    )
    assert message("hub").endswith(
        "the published weights of vit_tiny_patch16_224 are not on this machine and cannot be fetched (We cannot reach "
        "the Hub); go online once, or give the path of a file with them"
    )
