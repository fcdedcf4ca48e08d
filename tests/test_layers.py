"""Layers shared by oracle and LM."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from uvim_fsq.layers import MLP, lay_out_weights, patchify, unpatchify
from uvim_fsq.lm.timm_models import GELUTanh


@pytest.mark.parametrize("kind", ["far", "half", "gradient"])
def test_gelu_equals_torchs(kind: str) -> None:
    far = torch.logspace(-40, 38, 300)
    x = torch.cat([torch.linspace(-20, 20, 4001), far, -far, torch.tensor([0.0, torch.inf, torch.nan])])
    x = x.to(torch.bfloat16) if kind == "half" else x
    before, expected = x.clone(), F.gelu(x, approximate="tanh")
    with torch.set_grad_enabled(kind == "gradient"):
        found = GELUTanh(inplace=True)(x)
    assert torch.equal(x.nan_to_num(), before.nan_to_num())  # not in place
    if kind == "far":
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, equal_nan=True)
    else:
        assert torch.equal(found.nan_to_num(), expected.nan_to_num())


def test_gelu_on_a_cpu_is_not_torchs_slow_one() -> None:
    with torch.no_grad(), torch.profiler.profile() as profile:
        MLP(4, 8)(torch.randn(2, 4))
    names = {event.name for event in profile.events()}
    assert "aten::sigmoid_" in names and "aten::gelu" not in names


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
