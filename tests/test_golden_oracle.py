"""The oracle carries the reference's weights, imported, and gives its numbers, codes and dictionary."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.support.golden import golden, golden_checkpoint
from uvim_fsq.config.schema import OracleModelConfig, QuantizerConfig
from uvim_fsq.interop.published import oracle_rules, oracle_shape, translate
from uvim_fsq.layers import resize_tokens, unpatchify
from uvim_fsq.oracle.model import Oracle
from uvim_fsq.oracle.quantizers.fsq import FSQ
from uvim_fsq.oracle.quantizers.vq import VQ
from uvim_fsq.tasks.base import Categorical, LabelChannel, Real

CASES: dict[str, dict[str, LabelChannel]] = {
    "oracle_vq_depth": {"depth": Categorical(8)},
    "oracle_vq_depth_noctx": {"depth": Categorical(8)},
    "oracle_vq_panoptic": {"semantics": Categorical(5), "instances": Categorical(4)},
    "oracle_vq_color": {"color": Real(3)},
}


def golden_oracle(name: str) -> tuple[Oracle, dict[str, np.ndarray]]:
    tensors, arrays = golden_checkpoint(f"{name}.npz")
    shape = oracle_shape(tensors, name)
    assert shape.context == ("none" if "noctx" in name else "both")
    config = OracleModelConfig(
        patch_size=shape.patch_size,
        width=shape.width,
        encoder_depth=shape.encoder_depth,
        decoder_depth=shape.decoder_depth,
        num_heads=shape.num_heads,
        mlp_dim=shape.mlp_dim,
        code_length=16,
        context=shape.context,
        quantizer=QuantizerConfig(kind="vq", codebook_size=shape.codebook_size, codeword_dim=shape.codeword_dim),
    )
    oracle = Oracle(config, CASES[name], 64).eval()
    real = {channel: isinstance(kind, Real) for channel, kind in CASES[name].items()}
    oracle.load_state_dict(translate(tensors, oracle_rules(shape, real), name), strict=True)
    return oracle, arrays


def golden_inputs(name: str, arrays: dict[str, np.ndarray]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    labels: dict[str, torch.Tensor] = {}
    for channel, kind in CASES[name].items():
        given = torch.tensor(arrays[f"in/{channel}"])  # (B, patches, pixels), or (B, patches, 3, pixels)
        if isinstance(kind, Real):
            labels[channel] = unpatchify(given.permute(0, 1, 3, 2).float(), 8)
        else:
            labels[channel] = unpatchify(given.unsqueeze(-1), 8).squeeze(-1)
    return labels, torch.tensor(arrays["in/ctx"]).permute(0, 3, 1, 2)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_oracle_equals_the_reference(name: str) -> None:
    oracle, arrays = golden_oracle(name)
    labels, image = golden_inputs(name, arrays)
    bottleneck = oracle.encode(labels, image)
    np.testing.assert_allclose(VQ.standardize(bottleneck).numpy(), arrays["out/bottleneck"], atol=2e-4)
    tokens = oracle.tokenize(labels, image)
    np.testing.assert_array_equal(tokens.numpy(), arrays["out/code"])
    for codes, key in ((tokens, "out/logits"), (torch.tensor(arrays["in/random_code"]).long(), "out/decode_logits")):
        logits = oracle.label_head(oracle.decode_hidden(oracle.quantizer.indices_to_codes(codes), image))
        for channel in CASES[name]:
            theirs = arrays[f"{key}_{channel}"]  # classes before pixels
            np.testing.assert_allclose(logits[channel].transpose(2, 3).numpy(), theirs, atol=2e-4)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_one_training_step_of_the_dictionary_equals_the_reference(name: str) -> None:
    oracle, arrays = golden_oracle(name)
    labels, image = golden_inputs(name, arrays)
    quantizer = oracle.quantizer
    assert isinstance(quantizer, VQ)
    bottleneck = oracle.encode(labels, image)
    tokens = quantizer(bottleneck)[1]
    quantizer.accumulate(bottleneck, tokens)
    quantizer.ema_update(lambda x: x, seed=0)
    np.testing.assert_allclose(quantizer.counts.numpy(), arrays["out/ema_counts"], atol=1e-5)
    np.testing.assert_allclose(quantizer.sums.numpy(), arrays["out/ema_dictionary"], atol=2e-4)
    share = np.bincount(tokens.flatten(), minlength=quantizer.codebook_size) / tokens.numel()
    assert share.max() == pytest.approx(float(arrays["out/codebook_max_ratio"]))
    assert (share == 0).mean() == pytest.approx(float(arrays["out/codebook_zeros_ratio"]))


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
