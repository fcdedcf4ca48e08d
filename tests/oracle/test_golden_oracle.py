"""The oracle with imported reference weights gives the reference's numbers, codes and codebook update."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.support.golden import golden
from tests.support.golden_models import ORACLES, golden_oracle
from uvim_fsq.layers import resize_tokens, unpatchify
from uvim_fsq.oracle.quantizers.vq import VQ
from uvim_fsq.tasks.base import Real


def golden_inputs(name: str, arrays: dict[str, np.ndarray]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    labels: dict[str, torch.Tensor] = {}
    for channel, kind in ORACLES[name].items():
        given = torch.tensor(arrays[f"in/{channel}"])  # (B, patches, pixels), or (B, patches, 3, pixels)
        if isinstance(kind, Real):
            labels[channel] = unpatchify(given.permute(0, 1, 3, 2).float(), 8)
        else:
            labels[channel] = unpatchify(given.unsqueeze(-1), 8).squeeze(-1)
    return labels, torch.tensor(arrays["in/ctx"]).permute(0, 3, 1, 2)


@pytest.mark.parametrize("name", ORACLES)
@torch.no_grad()
def test_bottleneck_tokens_and_logits_equal_the_reference(name: str) -> None:
    oracle, arrays = golden_oracle(name)
    labels, image = golden_inputs(name, arrays)
    bottleneck = oracle.encode(labels, image)
    np.testing.assert_allclose(VQ.standardize(bottleneck).numpy(), arrays["out/bottleneck"], atol=2e-4)
    tokens = oracle.tokenize(labels, image)
    np.testing.assert_array_equal(tokens.numpy(), arrays["out/code"])
    for codes, key in ((tokens, "out/logits"), (torch.tensor(arrays["in/random_code"]).long(), "out/decode_logits")):
        logits = oracle.label_head(oracle.decode_hidden(oracle.quantizer.indices_to_codes(codes), image))
        for channel in ORACLES[name]:
            theirs = arrays[f"{key}_{channel}"]  # classes before pixels
            np.testing.assert_allclose(logits[channel].transpose(2, 3).numpy(), theirs, atol=2e-4)


@pytest.mark.parametrize("name", ORACLES)
@torch.no_grad()
def test_one_codebook_update_equals_the_reference(name: str) -> None:
    oracle, arrays = golden_oracle(name)
    labels, image = golden_inputs(name, arrays)
    quantizer = oracle.quantizer
    assert isinstance(quantizer, VQ)
    bottleneck = oracle.encode(labels, image)
    tokens = quantizer(bottleneck).indices
    quantizer.accumulate(bottleneck, tokens)
    quantizer.ema_update(lambda x: x, seed=0)
    np.testing.assert_allclose(quantizer.counts.numpy(), arrays["out/ema_counts"], atol=1e-5)
    np.testing.assert_allclose(quantizer.sums.numpy(), arrays["out/ema_dictionary"], atol=2e-4)
    share = np.bincount(tokens.flatten(), minlength=quantizer.codebook_size) / tokens.numel()
    assert share.max() == pytest.approx(float(arrays["out/codebook_max_ratio"]))
    assert (share == 0).mean() == pytest.approx(float(arrays["out/codebook_zeros_ratio"]))


@pytest.mark.parametrize("side", [4, 5, 16])
def test_bottleneck_resize_equals_the_reference(side: int) -> None:
    arrays = golden("pipeline.npz")
    key = f"resize/linear_{'up' if side == 16 else 'down'}_{side}x{side}"
    x = torch.tensor(arrays["resize/in"]).flatten(1, 2)
    ours = resize_tokens(x, side * side).view(1, side, side, 3)
    np.testing.assert_allclose(ours.numpy(), arrays[key], atol=1e-5)
