"""What every registered quantizer keeps: the contract of `oracle/quantizers/base.py`."""

from __future__ import annotations

import pytest
import torch

from examples.extensions.extensions import Binary
from uvim_fsq.oracle.quantizers.base import Quantizer
from uvim_fsq.oracle.quantizers.fsq import FSQ
from uvim_fsq.oracle.quantizers.vq import VQ

QUANTIZERS = {"fsq": lambda: FSQ([5, 5, 6]), "vq": lambda: VQ(24, 8, commitment=0.5), "binary": lambda: Binary(4)}


@pytest.fixture(params=sorted(QUANTIZERS))
def quantizer(request: pytest.FixtureRequest) -> Quantizer:
    torch.manual_seed(0)
    return QUANTIZERS[request.param]()


def test_indices_and_codes_are_inverse_over_the_whole_codebook(quantizer: Quantizer) -> None:
    indices = torch.arange(quantizer.codebook_size)
    codes = quantizer.indices_to_codes(indices)
    assert codes.shape == (quantizer.codebook_size, quantizer.dim) and codes.dtype == torch.float32
    assert torch.equal(quantizer.codes_to_indices(codes), indices)
    assert torch.equal(codes, quantizer.codebook())


def test_forward_gives_the_codes_of_its_indices_and_a_gradient(quantizer: Quantizer) -> None:
    z = torch.randn(2, 9, quantizer.dim, requires_grad=True)
    found = quantizer(z)
    assert found.indices.shape == (2, 9) and found.indices.dtype == torch.int64
    torch.testing.assert_close(found.codes, quantizer.indices_to_codes(found.indices))
    assert found.loss is None or found.loss.shape == (2,)
    (found.codes.square().sum() + (0 if found.loss is None else found.loss.sum())).backward()
    assert z.grad is not None and bool(z.grad.abs().sum() > 0)


@pytest.mark.parametrize("bf16", [False, True])
def test_expected_codes_are_the_mean_in_float32_also_inside_autocast(quantizer: Quantizer, bf16: bool) -> None:
    probabilities = torch.randn(2, 3, quantizer.codebook_size).softmax(-1)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        mean = quantizer.expected_codes(probabilities)
    assert mean.dtype == torch.float32
    expected = (probabilities.double().unsqueeze(-1) * quantizer.codebook().double()).sum(-2)
    torch.testing.assert_close(mean.double(), expected, rtol=1e-5, atol=1e-6)


def test_expected_codes_of_certain_tokens_are_their_codes(quantizer: Quantizer) -> None:
    indices = torch.tensor([[0, quantizer.codebook_size - 1, 3]])
    certain = torch.nn.functional.one_hot(indices, quantizer.codebook_size).float()
    torch.testing.assert_close(quantizer.expected_codes(certain), quantizer.indices_to_codes(indices))
