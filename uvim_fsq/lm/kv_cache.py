"""The key-value cache of the autoregressive decoder. With a position on the device, all steps are the same graph.

B batch, H heads, L code length, M memory tokens, hd head size, D decoder width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F


def to_int8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantizes (B, H, M, hd) to int8. Also returns scales (B, H, 1, hd) float32, one per channel over all tokens."""
    scale = x.float().abs().amax(2, keepdim=True).clamp_min(1e-8) / 127
    return (x / scale).round().clamp(-127, 127).to(torch.int8).contiguous(), scale


def attend_int8(
    query: torch.Tensor, key: torch.Tensor, key_scale: torch.Tensor, value: torch.Tensor, value_scale: torch.Tensor
) -> torch.Tensor:
    """Attention of one query (B, H, 1, hd) over int8 keys and values, computed in float32.

    Returns (B, H, 1, hd) in the query's dtype. The channel scales are factored out of both sums. Elementwise products
    and sums replace the matrix products, because the compiler fuses them into a single pass over the int8 values.
    """
    scaled = query.float() * key_scale / math.sqrt(query.shape[-1])
    weights = (scaled * key.float()).sum(-1, keepdim=True).softmax(2)
    return ((weights * value.float()).sum(2, keepdim=True) * value_scale).to(query.dtype)


#: The two functions above, compiled for the GPU. Uncompiled, each takes a dozen passes over memory.
_COMPILED: dict[str, Callable[..., Any]] = {}


def _compiles(x: torch.Tensor) -> bool:
    """Whether `_COMPILED` holds for a tensor: on a GPU, unless the whole prediction is being compiled."""
    return x.is_cuda and not torch.compiler.is_exporting()


def _compile_for_gpu() -> None:
    # Not at import time, because importing the compiler takes seconds.
    if not _COMPILED:
        _COMPILED.update({f.__name__: torch.compile(f, dynamic=False) for f in (to_int8, attend_int8)})


def _quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return _COMPILED["to_int8"](x) if _compiles(x) else to_int8(x)


@dataclass
class LayerCache:
    """The cached keys and values of one decoder block.

    Attributes:
        projection: (D, 3 D), the self-attention maps to queries, keys and values in one matrix. For small batches a
            step is bound by its number of kernels, so one product is faster than three.
        own: (2, B, H, L, hd), keys and values of self-attention, filled step by step.
        cross_key: (B, H, M, hd), keys of cross-attention, computed once; int8 if there are scales.
        cross_value: (B, H, M, hd), the values, likewise.
        key_scale: (B, H, 1, hd) float32, or None.
        value_scale: (B, H, 1, hd) float32, or None.
    """

    projection: torch.Tensor
    own: torch.Tensor
    cross_key: torch.Tensor
    cross_value: torch.Tensor
    key_scale: torch.Tensor | None = None
    value_scale: torch.Tensor | None = None

    @classmethod
    def create(
        cls, projection: torch.Tensor, key: torch.Tensor, value: torch.Tensor, length: int, *, int8: bool
    ) -> LayerCache:
        """Builds the cache from cross-attention keys and values (B, H, M, hd), whose dtype self-attention shares."""
        b, heads, _, size = key.shape
        own = key.new_zeros(2, b, heads, length, size)
        if not int8:
            return cls(projection, own, key, value)
        if _compiles(key):
            _compile_for_gpu()
        (key, key_scale), (value, value_scale) = _quantize(key), _quantize(value)
        return cls(projection, own, key, value, key_scale, value_scale)

    def append(self, position: torch.Tensor | int, new: torch.Tensor, span: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores new keys and values (2, B, H, 1, hd) of self-attention at a position.

        Returns all keys and values of the first `span` positions, (B, H, span, hd) each.
        """
        if isinstance(position, int):
            self.own[:, :, :, position : position + 1] = new
        else:
            self.own.index_copy_(3, position, new.to(self.own.dtype))
        key, value = self.own[:, :, :, :span].unbind()
        return key, value

    def attend_memory(self, query: torch.Tensor) -> torch.Tensor:
        """Cross-attention of one query (B, H, 1, hd) -> (B, H, 1, hd)."""
        if self.key_scale is None or self.value_scale is None:
            if query.dtype != self.cross_key.dtype:
                query = query.to(self.cross_key.dtype)
            return F.scaled_dot_product_attention(query, self.cross_key, self.cross_value)
        attend = _COMPILED["attend_int8"] if _compiles(query) else attend_int8
        return attend(query, self.cross_key, self.key_scale, self.cross_value, self.value_scale)


@dataclass
class DecoderCache:
    """The caches of all blocks, and the position of the next token.

    The position is a (1,) int64 tensor on the device, so that one step can be compiled for all positions, or a number,
    which needs fewer operators per step.
    """

    layers: list[LayerCache]
    position: torch.Tensor | int
