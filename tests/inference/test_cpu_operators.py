"""The operators of compiled packages equal torch's, and take their place in an exported program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from uvim_fsq.inference.cpu_operators import attention, fast_on_cpu, gelu, linear


def test_gelu_equals_torchs_everywhere() -> None:
    x = torch.cat([torch.linspace(-60, 60, 4001), torch.logspace(-30, 38, 200), -torch.logspace(-30, 38, 200)])
    torch.testing.assert_close(gelu(x, approximate="tanh"), F.gelu(x, approximate="tanh"), rtol=1e-5, atol=1e-6)
    assert gelu(x, approximate="none") is NotImplemented


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_equals_torchs(bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(7, 5, bias=bias), torch.randn(2, 3, 7, dtype=dtype)
    weight = layer.weight.to(dtype)
    found = linear(x, weight, layer.bias)
    expected = F.linear(x, weight, layer.bias.to(dtype) if bias else None)
    assert found.dtype == dtype  # although the bias is float32
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_of_a_single_query_equals_torchs(masked: bool, scale: float | None, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    query, key, value = (3 * torch.randn(2, 3, n, 8, dtype=dtype) for n in (1, 6, 6))
    mask = torch.tensor([[0, 0, 0, 0, -torch.inf, -torch.inf]], dtype=dtype) if masked else None
    found = attention(query, key, value, mask, scale=scale)
    expected = F.scaled_dot_product_attention(query, key, value, mask, scale=scale)
    assert (found.dtype, found.shape) == (dtype, expected.shape)
    # torch rounds more often in bf16.
    tolerance = 4e-2 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "options",
    [
        {"is_causal": True},
        {"dropout_p": 0.1},
        {"enable_gqa": True},
        {"attn_mask": torch.tensor([[True, False]])},
        {"attn_mask": torch.zeros(3, 1, 2)},
    ],
    ids=str,
)
def test_other_attention_is_left_to_torch(options: dict[str, Any]) -> None:
    query, key = torch.randn(2, 3, 1, 8), torch.randn(2, 3, 2, 8)
    assert attention(query, key, key, **options) is NotImplemented
    assert attention(key, key, key) is NotImplemented


class Small(nn.Module):
    """Both kinds of attention, a linear layer, both kinds of GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.scaled_dot_product_attention(x, x, x) + F.scaled_dot_product_attention(x[:, :, :1], x, x)
        return F.gelu(F.gelu(self.layer(x), approximate="tanh"))


def test_operators_are_replaced_in_a_program() -> None:
    torch.manual_seed(0)
    module, x = Small().eval(), torch.randn(2, 3, 4, 8)

    def targets(program: torch.export.ExportedProgram) -> list[Callable[..., Any]]:
        return [node.target for node in program.graph.nodes if callable(node.target)]

    with torch.no_grad():
        before = torch.export.export(module, (x,))
        after = fast_on_cpu(before)
        torch.testing.assert_close(after.module()(x), module(x), rtol=1e-5, atol=1e-5)
    aten = torch.ops.aten
    counts = (aten.scaled_dot_product_attention.default, aten.linear.default, aten.gelu.default)
    assert [targets(before).count(op) for op in counts] == [2, 1, 2]
    assert [targets(after).count(op) for op in counts] == [1, 0, 1]
