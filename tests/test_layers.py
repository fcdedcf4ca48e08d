"""Layers shared by oracle and LM."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from uvim_fsq.layers import lay_out_weights, patchify, unpatchify


def test_unpatchify_inverts_patchify() -> None:
    x = torch.randn(2, 16, 16, 3)
    assert torch.equal(unpatchify(patchify(x, 4), 4), x)


@pytest.mark.parametrize(("inputs", "outputs", "strides"), [(4, 6, (1, 6)), (5, 5, (1, 5)), (6, 4, (6, 1))])
def test_weights_are_stored_along_their_longer_side(inputs: int, outputs: int, strides: tuple[int, int]) -> None:
    linear = nn.Linear(inputs, outputs)
    model = nn.Sequential(linear, nn.LayerNorm(outputs))
    x = torch.randn(3, inputs)
    before, expected = {name: value.clone() for name, value in model.state_dict().items()}, model(x)
    lay_out_weights(model)
    assert linear.weight.stride() == strides
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    torch.testing.assert_close(model(x), expected)
