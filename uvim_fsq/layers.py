"""Transformer layers shared by the oracle and the language model. Independent of tasks and training.

Defaults follow the UViM reference code (big_vision, JAX), called "the reference" below.

Shapes: B batch, N tokens, M memory tokens, D width, H heads, S image side, p patch side, C channels.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

LN_EPS = 1e-6


class Layered:
    """A model that knows the order of its layers, for layer-wise learning rates (`optim.layer_decay`)."""

    def layer_order(self) -> list[list[nn.Module | nn.Parameter | None]]:
        """The layers from input to output, each a list of modules and parameters.

        What is learned anew for other labels or tokens (embeddings, heads) is in none, and learns at the full rate.
        """
        raise NotImplementedError


@torch.no_grad()
def lay_out_weights(model: nn.Module) -> None:
    """Stores the matrices of linear layers as a CPU's products of few rows read them fastest; values and shapes stay.

    That is along the longer side: a layer with as many outputs as inputs, or more, is stored transposed. With a single
    row such a product then takes 0.55 of the time at widths of 256 and 1,024, with 32 rows 0.8. For models that only
    predict: optimizers would keep their states in the other order.
    """
    for part in model.modules():
        if isinstance(part, nn.Linear) and part.out_features >= part.in_features:
            part.weight.data = part.weight.t().contiguous().t()


class Attention(nn.Module):
    """Multi-head attention with four separate linear layers: query, key, value, out.

    `bias` applies to all four (UViM's LM decoder has none). `memory_dim` is the width of what is attended to, by
    default `dim`.
    """

    def __init__(self, dim: int, num_heads: int, *, bias: bool = True, memory_dim: int | None = None) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(dim, dim, bias=bias)
        self.key = nn.Linear(memory_dim or dim, dim, bias=bias)
        self.value = nn.Linear(memory_dim or dim, dim, bias=bias)
        self.out = nn.Linear(dim, dim, bias=bias)

    def heads(self, x: torch.Tensor, projection: nn.Linear) -> torch.Tensor:
        """Projects (B, N, D) with `projection` and splits it into heads: (B, H, N, D / H)."""
        return projection(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        mask: torch.Tensor | None = None,
        is_causal: bool = False,
    ) -> torch.Tensor:
        """(B, H, N, D / H) queries over (B, H, M, D / H) keys and values -> (B, N, D), after the output projection."""
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)
        return self.out(x.transpose(1, 2).flatten(2))

    def forward(self, x: torch.Tensor, memory: torch.Tensor | None = None, *, is_causal: bool = False) -> torch.Tensor:
        """Attention of (B, N, D) to `memory` (B, M, memory_dim), or to itself without `memory`; (B, N, D)."""
        source = x if memory is None else memory
        q, k, v = self.heads(x, self.query), self.heads(source, self.key), self.heads(source, self.value)
        return self.attend(q, k, v, is_causal=is_causal)


def gelu(x: torch.Tensor) -> torch.Tensor:
    """GELU in its tanh approximation, as in the reference."""
    plain = x.device.type == "cpu" and x.dtype == torch.float32
    if not plain or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return F.gelu(x, approximate="tanh")
    # x / 2 (1 + tanh(u)) = x sigmoid(2 u). On a CPU torch's tanh takes longer than all of this.
    scale = 2 * math.sqrt(2 / math.pi)
    return (x * x).mul_(0.044715 * scale).add_(scale).mul_(x).sigmoid_().mul_(x)


class MLP(nn.Module):
    """Linear, GELU (tanh approximation, as in the reference), linear."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(gelu(self.fc1(x)))


class PatchEmbed(nn.Module):
    """Non-overlapping patch embedding as a reshape and a linear layer: (B, 3, S, S) -> (B, N, D), N = (S / p)^2.

    Equal to the reference's convolution with stride p and VALID padding.
    """

    def __init__(self, patch: int, dim: int) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Linear(patch * patch * 3, dim)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.proj(rearrange(image, "b c (h p) (w q) -> b (h w) (p q c)", p=self.patch, q=self.patch))


def init_transformer_(module: nn.Module) -> None:
    """UViM's initialization, in place: Xavier-uniform weights, attention biases 0, MLP biases normal(std 1e-6)."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
    for part in module.modules():
        if isinstance(part, MLP):
            nn.init.normal_(part.fc1.bias, std=1e-6)
            nn.init.normal_(part.fc2.bias, std=1e-6)


def position_embedding(length: int, dim: int) -> nn.Parameter:
    """A learned position embedding (1, length, dim), initialized from a normal with std 1/sqrt(dim)."""
    return nn.Parameter(torch.randn(1, length, dim) / math.sqrt(dim))


def signed_pixels(x: torch.Tensor) -> torch.Tensor:
    """uint8 pixels of any shape, 0 to 255 -> float32 in [-1, 1]. A floating-point tensor is returned unchanged."""
    return x if x.is_floating_point() else x.float() / 127.5 - 1


def patchify(x: torch.Tensor, patch: int) -> torch.Tensor:
    """(B, S, S) or (B, S, S, C) -> (B, N, p*p) or (B, N, p*p, C); patches and pixels in row-major order."""
    return rearrange(x, "b (h p) (w q) ... -> b (h w) (p q) ...", p=patch, q=patch)


def unpatchify(x: torch.Tensor, patch: int) -> torch.Tensor:
    """(B, N, p*p, C) -> (B, S, S, C) for a square grid of patches; inverts `patchify`."""
    side = math.isqrt(x.shape[1])
    return rearrange(x, "b (h w) (p q) ... -> b (h p) (w q) ...", h=side, w=side, p=patch, q=patch)


def resize_tokens(x: torch.Tensor, length: int) -> torch.Tensor:
    """Bilinear resize of a square token grid: (B, N, D) -> (B, length, D), same dtype.

    Half-pixel centers, antialiased when downsampling, as the reference resizes its bottleneck.
    """
    old, new = math.isqrt(x.shape[1]), math.isqrt(length)
    return resize_grid(x, (old, old), (new, new))


def resize_grid(x: torch.Tensor, old: tuple[int, int], new: tuple[int, int]) -> torch.Tensor:
    """Like `resize_tokens`, but from `old` to `new` rows and columns, which need not be equal."""
    if old == new:
        return x
    grid = rearrange(x, "b (h w) d -> b d h w", h=old[0])
    # The antialiased kernel supports float32 on every device, but not bfloat16.
    grid = F.interpolate(grid.float(), size=new, mode="bilinear", antialias=True, align_corners=False)
    return rearrange(grid, "b d h w -> b (h w) d").to(x.dtype)
