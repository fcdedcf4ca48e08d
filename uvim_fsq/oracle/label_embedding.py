"""The oracle's input layer, which embeds patches of label maps.

B batch, S image side, N patches, p patch side, C classes or channels, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from uvim_fsq.layers import patchify
from uvim_fsq.oracle import chunking
from uvim_fsq.tasks.base import Categorical, LabelChannel


class ChunkedOneHotLinear(torch.autograd.Function):
    """One-hot labels times a weight matrix: (B, N, p*p) integer classes, (p*p * C, D) weight -> (B, N, D).

    The one-hot labels are built chunk by chunk, once in the forward and once in the backward pass, so that they are
    never all in memory. The product runs in autocast's precision; the gradient of the weight is summed over the chunks
    in float32.
    """

    @staticmethod
    def _one_hots(patches: torch.Tensor, classes: int, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
        flat = patches.flatten(0, 1)
        # Comparing within the labels' own dtype is fastest, but the last class must fit into it or it would wrap.
        fits = classes - 1 <= torch.iinfo(patches.dtype).max
        class_ids = torch.arange(classes, device=patches.device, dtype=patches.dtype if fits else torch.int32)
        step = max(1, chunking.MAX_LOGITS // (flat.shape[1] * classes))
        for first in range(0, len(flat), step):
            rows = slice(first, first + step)
            # A label of -1 matches no class, so its one-hot vector is all zero.
            yield rows, (flat[rows].unsqueeze(-1) == class_ids).flatten(1).to(dtype)

    @staticmethod
    def forward(ctx: Any, patches: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        device = weight.device.type
        ctx.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        ctx.classes = len(weight) // patches.shape[2]
        ctx.save_for_backward(patches)
        table = weight.to(ctx.dtype)
        products = [one_hot @ table for _, one_hot in ChunkedOneHotLinear._one_hots(patches, ctx.classes, ctx.dtype)]
        return torch.cat(products).view(*patches.shape[:2], -1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, torch.Tensor]:
        (patches,) = ctx.saved_tensors
        flat = gradient.flatten(0, 1).to(ctx.dtype)
        total = flat.new_zeros(patches.shape[2] * ctx.classes, flat.shape[1], dtype=torch.float32)
        # The cast keeps torch.compile from recognizing the chunks of the forward pass and saving all of them.
        for rows, one_hot in ChunkedOneHotLinear._one_hots(patches.int(), ctx.classes, ctx.dtype):
            total += one_hot.T @ flat[rows]
        return None, total


def embedding_bag_linear(patches: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Same as `ChunkedOneHotLinear`, computed as a sum of weight rows: (B, N, p*p), (p*p * C, D) -> (B, N, D)."""
    b, n, pixels = patches.shape
    classes = patches.long()
    rows = classes.clamp_min(0) + torch.arange(pixels, device=patches.device) * (len(weight) // pixels)
    present = (classes >= 0).to(weight.dtype)
    summed = F.embedding_bag(rows.view(-1, pixels), weight, mode="sum", per_sample_weights=present.view(-1, pixels))
    return summed.view(b, n, -1)


class CategoricalEmbed(nn.Module):
    """Linear map of a patch's one-hot labels. A label of -1 contributes nothing, like an all-zero one-hot vector."""

    def __init__(self, num_classes: int, pixels: int, dim: int) -> None:
        super().__init__()
        # Row (pixel * classes + class). The standard deviation is that of a linear map with pixels * classes inputs.
        self.weight = nn.Parameter(torch.randn(pixels * num_classes, dim) * (pixels * num_classes) ** -0.5)
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """(B, N, p*p) integer classes -> (B, N, D)."""
        # The faster implementation on each device, as measured by tools/label_embeddings.py.
        product = ChunkedOneHotLinear.apply if patches.is_cuda else embedding_bag_linear
        return product(patches, self.weight) + self.bias


class RealEmbed(nn.Module):
    """Linear map of a patch's real label values: (B, N, p*p, C) -> (B, N, D)."""

    def __init__(self, channels: int, pixels: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(pixels * channels, dim)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        return self.proj(patches.flatten(2))


class LabelEmbed(nn.Module):
    """Sum of the embeddings of all label channels: channel -> (B, S, S[, C]) labels, to (B, N, D)."""

    def __init__(self, channels: Mapping[str, LabelChannel], patch: int, dim: int) -> None:
        super().__init__()
        self.patch = patch
        self.channels = nn.ModuleDict()
        for name, channel in channels.items():
            if isinstance(channel, Categorical):
                self.channels[name] = CategoricalEmbed(channel.num_classes, patch * patch, dim)
            else:
                self.channels[name] = RealEmbed(channel.channels, patch * patch, dim)

    def forward(self, labels: Mapping[str, torch.Tensor]) -> torch.Tensor:
        first, *others = (embed(patchify(labels[name], self.patch)) for name, embed in self.channels.items())
        for other in others:
            first = first + other
        return first
