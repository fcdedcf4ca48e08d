"""Operators written so that torch's compiler makes fast CPU code of them; for packages (`ahead_of_time`).

Only roundings differ. The reasons and the figures are in docs/performance.md.

B batch, H heads, N queries, T keys, hd head size.
"""

from __future__ import annotations

import math
from typing import Any

import torch


def gelu(x: torch.Tensor, *, approximate: str = "none") -> Any:
    """The tanh approximation by an exponential, which is vectorized, instead of the C library's tanh."""
    if approximate != "tanh":
        return NotImplemented
    return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
    """The bias is added by the operators that follow. A product that adds it is given a copy of it for each row."""
    y = torch.matmul(x, weight.t())
    return y if bias is None else y + bias.to(y.dtype)


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """The attention of a single query by fused sums instead of matrix products, which are called for each head.

    `query` (B, H, 1, hd), `key` and `value` (B, H, T, hd), an additive mask (1, T) -> (B, H, 1, hd). Others are left as
    they are.
    """
    other_mask = attn_mask is not None and (attn_mask.dtype == torch.bool or attn_mask.dim() != 2)
    if query.shape[-2] != 1 or dropout_p or is_causal or enable_gqa or other_mask:
        return NotImplemented
    scaled = query.float() * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    weights = (scaled * key.float()).sum(-1)
    if attn_mask is not None:
        weights = weights + attn_mask
    attended = (weights.softmax(-1).unsqueeze(-1) * value.float()).sum(-2, keepdim=True)
    return attended.to(query.dtype)


def fast_on_cpu(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """An exported program with the operators of this module in the place of torch's."""
    aten = torch.ops.aten
    return program.run_decompositions(
        {
            aten.gelu.default: gelu,
            aten.linear.default: linear,
            aten.scaled_dot_product_attention.default: attention,
        }
    )
