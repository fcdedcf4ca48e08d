"""The transformer block of the token models' decoders.

B batch, L code length, D decoder width, M memory tokens, E encoder width, H heads, hd head size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from uvim_fsq.config.schema import LMModelConfig
from uvim_fsq.layers import LN_EPS, MLP, Attention
from uvim_fsq.lm.kv_cache import LayerCache


class DecoderBlock(nn.Module):
    """Pre-norm block of self-attention, cross-attention and MLP. Attention projections have no bias.

    Args:
        config: the architecture.
        memory_dim: E.
        causal: whether a position attends only to itself and earlier ones.
    """

    def __init__(self, config: LMModelConfig, memory_dim: int, *, causal: bool = True) -> None:
        super().__init__()
        self.causal = causal
        dim = config.width
        self.norm1 = nn.LayerNorm(dim, eps=LN_EPS)
        self.self_attn = Attention(dim, config.num_heads, bias=False)
        self.norm2 = nn.LayerNorm(dim, eps=LN_EPS)
        self.cross_attn = Attention(dim, config.num_heads, bias=False, memory_dim=memory_dim)
        self.norm3 = nn.LayerNorm(dim, eps=LN_EPS)
        self.mlp = MLP(dim, config.mlp_dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        """One pass over all positions: (B, L, D), memory (B, M, E) -> (B, L, D)."""
        return self.attend(x, *self.memory_heads(memory))

    def memory_heads(self, memory: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the cross-attention, (B, H, M, hd) each, which all passes over an image share."""
        cross = self.cross_attn
        return cross.heads(memory, cross.key), cross.heads(memory, cross.value)

    def attend(self, x: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """`forward` with the keys and values of `memory_heads`: (B, L, D) -> (B, L, D)."""
        cross = self.cross_attn
        x = x + self.dropout(self.self_attn(self.norm1(x), is_causal=self.causal))
        x = x + self.dropout(cross.attend(cross.heads(self.norm2(x), cross.query), key, value))
        return x + self.dropout(self.mlp(self.norm3(x)))

    def step(
        self, x: torch.Tensor, cache: LayerCache, position: torch.Tensor | int, span: int, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """One position of causal decoding: (B, D) -> (B, D).

        It attends to the first `span` positions, under the mask (1, span) if there is one. Without a dimension for the
        single position, each linear layer is one operator.
        """
        attn, cross = self.self_attn, self.cross_attn
        y = (self.norm1(x) @ cache.projection).view(x.shape[0], 3, attn.num_heads, 1, -1).transpose(0, 1)
        key, value = cache.append(position, y[1:], span)
        attended = F.scaled_dot_product_attention(y[0].to(key.dtype), key, value, attn_mask=mask)
        x = x + attn.out(attended.flatten(1))
        query = cross.query(self.norm2(x)).view(x.shape[0], cross.num_heads, 1, -1)
        x = x + cross.out(cache.attend_memory(query).flatten(1))
        return x + self.mlp(self.norm3(x))
