"""Counts of modules without a formula, against the formulas of a plain ViT and of a convolution."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from uvim_fsq.config.schema import EncoderConfig
from uvim_fsq.lm.image_encoder import ImageEncoder, build_image_encoder
from uvim_fsq.performance.counting import forward_flops, meta_copy, saved_bytes

VIT = EncoderConfig("vit_tiny_patch16_224", patch_size=8, width=160, depth=3, num_heads=2, mlp_dim=672)


def vit() -> ImageEncoder:
    return build_image_encoder(VIT, 64)


def test_counted_flop_of_a_vit_equal_its_formula() -> None:
    encoder = vit()
    assert forward_flops(encoder, (1, 3, 64, 64)) == encoder.cost().forward


@pytest.mark.slow
@pytest.mark.parametrize("bf16", [False, True])
def test_counted_bytes_of_a_vit_equal_their_formula(bf16: bool) -> None:
    encoder = vit()
    found = saved_bytes(encoder, (5, 3, 64, 64), bf16=bf16) / 5
    assert found == pytest.approx(encoder.activation_bytes(2 if bf16 else 4), rel=0.04)


class Attention(nn.Module):
    """One head of attention with a learned bias, over the pixels of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(3, 3)
        self.bias = nn.Parameter(torch.zeros(1, 1, 36, 36))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.proj(x.flatten(2).transpose(1, 2).unsqueeze(1))
        return F.scaled_dot_product_attention(x, 2 * x, 3 * x, attn_mask=self.bias)


def test_attention_keeps_no_scores() -> None:
    """But query, key, value and weighted sum, as fused kernels do, also those with a bias. The fifth is the image."""
    assert saved_bytes(Attention(), (5, 3, 6, 6), bf16=False) == 5 * (4 * 5 * 36 * 3)


def test_counting_leaves_the_module_alone() -> None:
    """Its mode, its weights and its statistics."""
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    assert forward_flops(module, (1, 3, 6, 6)) == 2 * 4 * 4 * 4 * 27
    assert saved_bytes(module, (1, 3, 6, 6), bf16=False) > 0
    assert not module.training and all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_a_meta_copy_shares_no_weights() -> None:
    copied = meta_copy(nn.BatchNorm1d(3))
    assert {x.device.type for x in (*copied.parameters(), *copied.buffers())} == {"meta"}


def test_a_frozen_encoder_costs_its_forward_pass_and_keeps_only_features() -> None:
    """And the gradient of the projection's weights."""
    encoder = build_image_encoder(replace(VIT, out_width=24), 64)
    model, projection = vit().cost().forward, 2 * 160 * 24 * 64
    assert encoder.cost().forward == model + projection and encoder.cost().train == 3 * (model + projection)
    encoder.config = replace(encoder.config, frozen=True)
    assert encoder.cost().train == model + 2 * projection
    assert encoder.activation_bytes(4) == 4 * 160 * 64
