"""Finite Scalar Quantization (arXiv 2309.15505, section 3): bound, round, mixed radix. No parameters.

d channels, L_i levels of channel i. All computation is in float32, even inside autocast.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Literal

import torch

from uvim_fsq.config.rules import resolve_levels
from uvim_fsq.config.schema import QuantizerConfig
from uvim_fsq.oracle.quantizers.base import Quantized, Quantizer, register_quantizer

EPS = 1e-3


class FSQ(Quantizer):
    """Rounds each bounded channel to one of L_i values, with a straight-through gradient.

    Args:
        levels: L_i per channel, or the name of a preset such as "2^12".
        shift: "published" uses tan(offset / half_l) inside the tanh, as printed in the paper. "centered" uses atanh,
            which makes bound(0) = 0 for even L_i (undefined for L_i = 2).

    Warns about levels below 5, which the paper advises against. Raises UserError for invalid levels.
    """

    def __init__(self, levels: Sequence[int] | str, *, shift: Literal["published", "centered"] = "published") -> None:
        super().__init__()
        self.levels = resolve_levels(levels, shift)
        if min(self.levels) < 5:
            warnings.warn(f"FSQ levels {list(self.levels)}: fewer than 5 per channel gave worse samples", stacklevel=2)
        self.dim = len(self.levels)
        self.codebook_size = math.prod(self.levels)
        half = [(level - 1) * (1 - EPS) / 2 for level in self.levels]
        offset = [0.0 if level % 2 else 0.5 for level in self.levels]
        invert = math.tan if shift == "published" else math.atanh
        shifts = [invert(o / h) for o, h in zip(offset, half, strict=True)]
        basis = [math.prod(self.levels[:i]) for i in range(self.dim)]
        for name, values, dtype in (
            ("half_l", half, torch.float32),
            ("offset", offset, torch.float32),
            ("shift", shifts, torch.float32),
            ("half_width", [level // 2 for level in self.levels], torch.float32),
            ("level", self.levels, torch.int64),
            ("basis", basis, torch.int64),
        ):
            # Derived from `levels`, so not part of a checkpoint.
            self.register_buffer(name, torch.tensor(values, dtype=dtype), persistent=False)

    half_l: torch.Tensor
    offset: torch.Tensor
    shift: torch.Tensor
    half_width: torch.Tensor
    level: torch.Tensor
    basis: torch.Tensor

    def forward(self, z: torch.Tensor) -> Quantized:
        """Quantizes (..., d) reals to codes (..., d) float32 in [-1, 1] and indices (...) int64."""
        # Autocast does not change the dtype of elementwise operations.
        bounded = self.bound(z.float())
        rounded = bounded + (bounded.round() - bounded).detach()
        codes = rounded / self.half_width
        return Quantized(codes, self.codes_to_indices(codes))

    def bound(self, z: torch.Tensor) -> torch.Tensor:
        """Squashes each channel into the open interval that rounds to its L_i integers."""
        return torch.tanh(z + self.shift) * self.half_l - self.offset

    def codes_to_indices(self, codes: torch.Tensor) -> torch.Tensor:
        """(..., d) codes -> (...) int64 in [0, codebook_size); channel 0 varies fastest."""
        digits = (codes.float() * self.half_width + self.half_width).round().long()
        return (digits * self.basis).sum(-1)

    def indices_to_digits(self, indices: torch.Tensor) -> torch.Tensor:
        """(...) int64 -> the level of each channel, (..., d) int64 in [0, L_i)."""
        return (indices.unsqueeze(-1) // self.basis) % self.level

    def indices_to_codes(self, indices: torch.Tensor) -> torch.Tensor:
        """(...) int64 -> (..., d) float32 codes, computed without a stored codebook."""
        return (self.indices_to_digits(indices).float() - self.half_width) / self.half_width

    def extra_repr(self) -> str:
        return f"levels={list(self.levels)}, codebook_size={self.codebook_size}"


@register_quantizer("fsq")
def build_fsq(config: QuantizerConfig) -> FSQ:
    """Builds FSQ from `model.quantizer.levels` and `shift`."""
    return FSQ(config.levels, shift=config.shift)
