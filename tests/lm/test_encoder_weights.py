"""Published weights of image encoders: from files and from the hub, and what does not fit."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch

from uvim_fsq.config.schema import EncoderConfig
from uvim_fsq.data.published_weights import create_published
from uvim_fsq.errors import UserError
from uvim_fsq.lm import timm_models
from uvim_fsq.lm.image_encoder import build_image_encoder


def test_published_weights_from_a_file(tmp_path: Path) -> None:
    name = "vit_tiny_patch16_224"
    published = timm.create_model(name, num_classes=1000)
    file = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(published.state_dict(), file)
    encoder = build_image_encoder(EncoderConfig(name=name, weights=str(file)), 64)
    assert encoder.mean.flatten().tolist() == pytest.approx(published.pretrained_cfg["mean"])
    assert encoder.std.flatten().tolist() == pytest.approx(published.pretrained_cfg["std"])
    assert torch.equal(encoder.model.blocks[3].attn.qkv.weight, published.blocks[3].attn.qkv.weight)
    assert encoder.model.pos_embed.shape == (1, 16, 192) and encoder.model.cls_token is None
    assert encoder(torch.zeros(1, 3, 64, 64)).shape == (1, 16, 192)
    safetensors.torch.save_file({"nothing": torch.zeros(1)}, file)
    with pytest.raises(UserError, match="its arrays belong to a different model"):
        build_image_encoder(EncoderConfig(name=name, weights=str(file)), 64)
    with pytest.raises(UserError, match="needs the architecture as published; remove model.encoder.width$"):
        build_image_encoder(EncoderConfig(name=name, weights=str(file), width=64), 64)
    with pytest.raises(UserError, match="no such file"):
        build_image_encoder(EncoderConfig(name=name, weights=str(tmp_path / "none.npz")), 64)


def vit_npz(state: dict[str, torch.Tensor], heads: int) -> dict[str, np.ndarray]:
    """A timm ViT's weights under the names and in the layouts of the public ImageNet-21k .npz files."""
    size = state["norm.weight"].numel()
    arrays = {
        "embedding/kernel": state["patch_embed.proj.weight"].permute(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        "cls": state["cls_token"],
        "head/kernel": state["head.weight"].T,
        "head/bias": state["head.bias"],
        "Transformer/posembed_input/pos_embedding": state["pos_embed"],
        "Transformer/encoder_norm/scale": state["norm.weight"],
        "Transformer/encoder_norm/bias": state["norm.bias"],
    }
    for i in range(sum(name.endswith("attn.qkv.weight") for name in state)):
        ours, theirs = f"blocks.{i}.", f"Transformer/encoderblock_{i}/"
        attention = f"{theirs}MultiHeadDotProductAttention_1/"
        for k, norm in ((0, "norm1"), (2, "norm2")):
            arrays[f"{theirs}LayerNorm_{k}/scale"] = state[f"{ours}{norm}.weight"]
            arrays[f"{theirs}LayerNorm_{k}/bias"] = state[f"{ours}{norm}.bias"]
        for k, part in enumerate(("query", "key", "value")):
            weight, bias = (state[f"{ours}attn.qkv.{kind}"].chunk(3)[k] for kind in ("weight", "bias"))
            arrays[f"{attention}{part}/kernel"] = weight.T.reshape(size, heads, -1)
            arrays[f"{attention}{part}/bias"] = bias.reshape(heads, -1)
        arrays[f"{attention}out/kernel"] = state[f"{ours}attn.proj.weight"].T.reshape(heads, -1, size)
        arrays[f"{attention}out/bias"] = state[f"{ours}attn.proj.bias"]
        for k in (0, 1):
            arrays[f"{theirs}MlpBlock_3/Dense_{k}/kernel"] = state[f"{ours}mlp.fc{k + 1}.weight"].T
            arrays[f"{theirs}MlpBlock_3/Dense_{k}/bias"] = state[f"{ours}mlp.fc{k + 1}.bias"]
    return {name: value.detach().numpy() for name, value in arrays.items()}


def test_weights_in_the_public_npz_layout_are_loaded(tmp_path: Path) -> None:
    name = "vit_tiny_patch16_224.augreg_in21k"
    published = timm.create_model(name)
    np.savez(tmp_path / "vit.npz", **vit_npz(published.state_dict(), heads=3))
    encoder = build_image_encoder(EncoderConfig(name=name, weights=str(tmp_path / "vit.npz")), 224)
    assert encoder.mean.unique().tolist() == encoder.std.unique().tolist() == [0.5]
    found, expected = encoder.model.state_dict(), published.state_dict()
    assert torch.equal(found.pop("pos_embed"), expected["pos_embed"][:, 1:])
    assert all(torch.equal(value, expected[key]) for key, value in found.items())


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


def save(model: torch.nn.Module, file: Path) -> Path:
    safetensors.torch.save_file({name: x.contiguous() for name, x in model.state_dict().items()}, file)
    return file


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        ("test_vit3", 1),
        pytest.param("vit_small_patch14_dinov2", 1, marks=pytest.mark.slow),
        pytest.param("vit_small_patch14_reg4_dinov2", 5, marks=pytest.mark.slow),
        pytest.param("vit_small_patch16_dinov3", 5, marks=pytest.mark.slow),
        pytest.param("vit_base_patch16_siglip_224.v2_webli", 0, marks=pytest.mark.slow),
    ],
)
def test_features_of_published_vits_are_their_patch_tokens(name: str, prefix: int, tmp_path: Path) -> None:
    """Class and register tokens take part, as in training, but are not among the features."""
    side = 4 * timm.create_model(name).patch_embed.patch_size[0]
    published = timm.create_model(name, img_size=side).eval()
    torch.nn.init.normal_(published.norm.weight)
    assert published.num_prefix_tokens == prefix
    config = EncoderConfig(name, str(save(published, tmp_path / "weights.safetensors")), image_size=side)
    encoder = build_image_encoder(config, 512).eval()
    image = torch.randint(0, 256, (2, 3, side, side), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    cfg = published.pretrained_cfg
    mean, std = (torch.tensor(cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    expected = published.forward_features((image / 255 - mean) / std)[:, prefix:]
    found = encoder(image)
    assert encoder.grid == (4, 4) and found.shape == expected.shape == (2, 16, encoder.num_features)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("test_resnet", (-2,)),
        pytest.param("swin_tiny_patch4_window7_224", (-1,), marks=pytest.mark.slow),
        pytest.param("convnext_atto", (2,), marks=pytest.mark.slow),
    ],
)
def test_features_of_published_hierarchical_models_are_those_of_the_stage(
    name: str, stages: tuple[int], tmp_path: Path
) -> None:
    """Each position normalized over its channels, because the stages of these models have any scale."""
    size: dict[str, int] = {"img_size": 64} if "swin" in name else {}
    file = save(timm.create_model(name, **size), tmp_path / "weights.safetensors")
    there: dict[str, Any] = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(file)}}
    published = timm.create_model(name, features_only=True, out_indices=stages, **there, **size).eval()
    encoder = build_image_encoder(EncoderConfig(name, str(file), stages=stages), 64).eval()
    image = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    (stage,) = published(encoder.normalize(image))
    if stage.shape[1] != encoder.num_features:
        stage = stage.permute(0, 3, 1, 2)
    assert encoder.grid == tuple(stage.shape[2:])
    expected = torch.nn.functional.layer_norm(stage.flatten(2).transpose(1, 2), [encoder.num_features], eps=1e-6)
    torch.testing.assert_close(encoder(image), expected, atol=1e-4, rtol=1e-4)


def test_weights_of_another_size_of_the_model_are_refused(tmp_path: Path) -> None:
    file = save(timm.create_model("test_resnet"), tmp_path / "weights.safetensors")
    with pytest.raises(UserError, match=r"not contain weights of model.encoder.name=resnet18 .its arrays belong to a"):
        build_image_encoder(EncoderConfig("resnet18", str(file)), 64)


@pytest.mark.parametrize(
    ("part", "said"), [("norm", r"missing \['norm.weight'"), ("more", r"unexpected \['more.weight'")]
)
def test_published_weights_with_other_parts_are_refused(part: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    published = timm.create_model("test_vit")
    setattr(published, part, torch.nn.LayerNorm(4) if part == "more" else torch.nn.Identity())
    monkeypatch.setattr(timm_models, "create_published", lambda *_: (published, (0.5,) * 3, (0.5,) * 3))
    with pytest.raises(UserError, match=f"weights of test_vit do not fit: .*{said}"):
        build_image_encoder(EncoderConfig("test_vit", "hub"), 32)


def test_overrides_of_any_family_are_refused_with_weights() -> None:
    with pytest.raises(UserError, match="weights=hub needs the architecture as published; remove model.encoder.depth$"):
        build_image_encoder(EncoderConfig("test_vit2", "hub", depth=2), 32)


def test_an_encoder_with_the_packages_weights_has_their_mean_and_deviation() -> None:
    encoder = build_image_encoder(EncoderConfig("tf_efficientnet_lite0", "package", stages=(2,)), 64)
    assert encoder.mean.unique().item() == pytest.approx(127 / 255)
    assert encoder.std.unique().item() == pytest.approx(128 / 255)
    published, *_ = create_published("tf_efficientnet_lite0", "package")
    found, expected = encoder.model.state_dict(), published.state_dict()
    assert found and all(torch.equal(value, expected[key]) for key, value in found.items())
