"""Image encoders: published weights, names and sizes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch

from uvim_fsq.config.schema import EncoderConfig
from uvim_fsq.errors import UserError
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


def test_encoder_names_and_sizes() -> None:
    with pytest.raises(UserError, match="did you mean"):
        build_image_encoder(EncoderConfig(name="vit_tinny_patch16_224"), 64)
    with pytest.raises(UserError, match="not divisible"):
        build_image_encoder(EncoderConfig(name="vit_tiny_patch16_224"), 60)
