"""The keys and values that decoding keeps, in static buffers, so that one step can be captured as a graph.

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
    """(B, H, M, hd) reals -> the same as int8, and scales (B, H, 1, hd) float32: one per channel, over all tokens."""
    scale = x.float().abs().amax(2, keepdim=True).clamp_min(1e-8) / 127
    return (x / scale).round().clamp(-127, 127).to(torch.int8).contiguous(), scale


def attend_int8(
    query: torch.Tensor, key: torch.Tensor, key_scale: torch.Tensor, value: torch.Tensor, value_scale: torch.Tensor
) -> torch.Tensor:
    """Attention of one query (B, H, 1, hd) over int8 keys and values, in float32 -> (B, H, 1, hd) of the query's type.

    The scales of the channels are drawn out of both sums. Written as products and sums, not as matrix products: those
    the compiler reads as one pass over the int8 numbers, which no matrix kernel does.
    """
    scaled = query.float() * key_scale / math.sqrt(query.shape[-1])
    weights = (scaled * key.float()).sum(-1, keepdim=True).softmax(2)
    return ((weights * value.float()).sum(2, keepdim=True) * value_scale).to(query.dtype)


#: Both compiled for a GPU, where each is a dozen passes over the memory if its operators run one by one.
_ON_GPU: dict[str, Callable[..., Any]] = {}


def _compile_for_gpu() -> None:
    # Not on import: it takes seconds, most of them to import the compiler.
    if not _ON_GPU:
        _ON_GPU.update({f.__name__: torch.compile(f, dynamic=False) for f in (to_int8, attend_int8)})


def _small(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return _ON_GPU["to_int8"](x) if x.is_cuda else to_int8(x)


@dataclass
class LayerCache:
    """One block's own keys and values (2, B, H, L, hd), filled step by step, and cross ones (B, H, M, hd), made once.

    With scales (B, H, 1, hd) the cross ones are int8. `projection` (3 D, D) holds the maps to the own queries, keys and
    values in one: a step is bound by the number of its operators where few images are decoded.
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
        """For cross keys and values (B, H, M, hd); the own ones are of their type."""
        b, heads, _, size = key.shape
        own = key.new_zeros(2, b, heads, length, size)
        if not int8:
            return cls(projection, own, key, value)
        if key.is_cuda:
            _compile_for_gpu()
        (key, key_scale), (value, value_scale) = _small(key), _small(value)
        return cls(projection, own, key, value, key_scale, value_scale)

    def refill(self, projection: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Takes over the present weights, and the cross keys and values of other images, in place."""
        self.projection.copy_(projection)
        for x, buffer, scale in ((key, self.cross_key, self.key_scale), (value, self.cross_value, self.value_scale)):
            if scale is not None:
                x, new_scale = _small(x)
                scale.copy_(new_scale)
            buffer.copy_(x)

    def attend_memory(self, query: torch.Tensor) -> torch.Tensor:
        """Cross-attention of one query (B, H, 1, hd) -> (B, H, 1, hd)."""
        if self.key_scale is None or self.value_scale is None:
            query = query.to(self.cross_key.dtype)
            return F.scaled_dot_product_attention(query, self.cross_key, self.cross_value)
        attend = _ON_GPU["attend_int8"] if query.is_cuda else attend_int8
        return attend(query, self.cross_key, self.key_scale, self.cross_value, self.value_scale)


@dataclass
class DecoderCache:
    """Buffers of all blocks and the position of the next token, a tensor (1,) int64 on the device."""

    layers: list[LayerCache]
    position: torch.Tensor
