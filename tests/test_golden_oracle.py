"""The oracle's network carries the reference's weights and gives its numbers; only the quantizer (VQ there) differs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from tests.golden_oracle import oracle_state
from tests.helpers import golden
from uvim_fsq.config import OracleModelConfig, QuantizerConfig
from uvim_fsq.layers import resize_tokens, unpatchify
from uvim_fsq.oracle.fsq import FSQ
from uvim_fsq.oracle.model import Oracle
from uvim_fsq.tasks.base import Categorical, Real

CASES = {
    "oracle_vq_depth": ("depth", Categorical(8), "both"),
    "oracle_vq_depth_noctx": ("depth", Categorical(8), "none"),
    "oracle_vq_color": ("color", Real(3), "both"),
}


def golden_oracle(name: str) -> tuple[Oracle, dict[str, np.ndarray], str]:
    channel, kind, context = CASES[name]
    arrays = dict(golden(f"{name}.npz"))
    config = OracleModelConfig(
        patch_size=8,
        width=32,
        encoder_depth=2,
        decoder_depth=3,
        num_heads=4,
        mlp_dim=64,
        code_length=16,
        context=context,
        quantizer=QuantizerConfig(levels=(5, 5)),
    )
    oracle = Oracle(config, {channel: kind}, 64).eval()
    # The dictionary's 16 dimensions in the place of FSQ's two.
    oracle.encoder_head, oracle.decoder_stem = nn.Linear(32, 16), nn.Linear(16, 32)
    state = oracle_state(arrays, channel, real=isinstance(kind, Real), encoder_depth=2, decoder_depth=3)
    oracle.load_state_dict(state, strict=True)
    return oracle, arrays, channel


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_encoder_and_decoder_equal_the_reference(name: str) -> None:
    oracle, arrays, channel = golden_oracle(name)
    labels = torch.tensor(arrays[f"in/{channel}"])
    if channel == "color":
        labels = labels.permute(0, 1, 3, 2).float()  # (B, patches, pixels, 3)
    labels = {channel: unpatchify(labels if channel == "color" else labels.unsqueeze(-1), 8)}
    labels = {channel: labels[channel] if channel == "color" else labels[channel].squeeze(-1)}
    image = torch.tensor(arrays["in/ctx"]).permute(0, 3, 1, 2)
    z = oracle.encode(labels, image)
    z = (z - z.mean(-1, keepdim=True)) / (z.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    np.testing.assert_allclose(z.numpy(), arrays["out/bottleneck"], atol=2e-4)

    words = torch.tensor(arrays["state/dictionary"] / arrays["state/counts"][:, None])
    words = words / words.norm(dim=-1, keepdim=True)
    tokens = torch.cdist(z, words).argmin(-1)
    np.testing.assert_array_equal(tokens.numpy(), arrays["out/code"])
    for codes, key in ((tokens, f"out/logits_{channel}"), (arrays["in/random_code"], f"out/decode_logits_{channel}")):
        hidden = oracle.decode_hidden(words[torch.as_tensor(codes).long()], image)
        logits = oracle.label_head(hidden)[channel].transpose(2, 3)  # theirs: classes before pixels
        np.testing.assert_allclose(logits.numpy(), arrays[key], atol=2e-4)


def _fsq_levels() -> list[str]:
    return sorted({name.split("/")[1] for name in golden("pipeline.npz") if name.startswith("fsq/")})


@pytest.mark.filterwarnings("ignore:FSQ levels")
@pytest.mark.parametrize("levels", _fsq_levels())
def test_fsq_equals_the_reference(levels: str) -> None:
    arrays = golden("pipeline.npz")
    quantizer = FSQ([int(level) for level in levels.split("x")])
    z = torch.tensor(arrays[f"fsq/{levels}/z"], requires_grad=True)
    codes, indices = quantizer(z)
    (codes * torch.arange(1, quantizer.dim + 1)).sum().backward()
    np.testing.assert_allclose(codes.detach().numpy(), arrays[f"fsq/{levels}/zhat"], atol=1e-6)
    np.testing.assert_array_equal(indices.numpy(), arrays[f"fsq/{levels}/index"])
    assert z.grad is not None
    np.testing.assert_allclose(z.grad.numpy(), arrays[f"fsq/{levels}/grad"], atol=1e-5)


@pytest.mark.parametrize("side", [4, 5, 16])
def test_bottleneck_resize_equals_the_reference(side: int) -> None:
    arrays = golden("pipeline.npz")
    key = f"resize/linear_{'up' if side == 16 else 'down'}_{side}x{side}"
    x = torch.tensor(arrays["resize/in"]).flatten(1, 2)
    ours = resize_tokens(x, side * side).view(1, side, side, 3)
    np.testing.assert_allclose(ours.numpy(), arrays[key], atol=1e-5)
