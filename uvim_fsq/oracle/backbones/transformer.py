"""The transformer used as the oracle's encoder and decoder (UViM, appendix A).

B batch, N tokens, D width.
"""

from __future__ import annotations

import torch
from torch import nn

from uvim_fsq.layers import LN_EPS, MLP, Attention, init_transformer_


class EncoderBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, dim: int, num_heads: int, mlp_dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=LN_EPS)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=LN_EPS)
        self.mlp = MLP(dim, mlp_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """`depth` encoder blocks followed by a LayerNorm: (B, N, D) -> (B, N, D)."""

    def __init__(self, dim: int, depth: int, num_heads: int, mlp_dim: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(EncoderBlock(dim, num_heads, mlp_dim) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=LN_EPS)
        init_transformer_(self)

    def layers(self) -> list[list[nn.Module | nn.Parameter | None]]:
        """The blocks from input to output, the last one with the norm."""
        blocks: list[list[nn.Module | nn.Parameter | None]] = [[block] for block in self.blocks]
        return [*blocks[:-1], [*blocks[-1], self.norm]]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.norm(x)
