"""The oracle's two ends: label maps to token embeddings, and hidden states to label logits and their loss.

B batch, N patches, p patch side, C classes or channels, D width. Logits are channel-last: (B, N, p*p, C).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from uvim_fsq.layers import patchify
from uvim_fsq.tasks.base import Categorical, LabelChannel, Real

Loss = Callable[[Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]], tuple[torch.Tensor, dict[str, torch.Tensor]]]


#: Most one-hot labels or logits that exist at a time; what holds more is done in pieces. With their float32 copies and
#: gradients 2^28 logits are 2 to 5 GB. Smaller pieces are slower: each reads the weights and adds to their gradient.
BUDGET = 2**28


class OneHotProduct(torch.autograd.Function):
    """(B, N, p*p) integer classes times (p*p * C, D) weight -> (B, N, D), one-hot labels made piece by piece, twice.

    The product runs in autocast's precision; the weight's gradient is summed over the pieces in float32.
    """

    @staticmethod
    def _pieces(patches: torch.Tensor, classes: int, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
        flat = patches.flatten(0, 1)
        # Of the labels' own type, which is the fastest to compare with, if it holds the last class; else it would wrap.
        holds = classes - 1 <= torch.iinfo(patches.dtype).max
        known = torch.arange(classes, device=patches.device, dtype=patches.dtype if holds else torch.int32)
        step = max(1, BUDGET // (flat.shape[1] * classes))
        for first in range(0, len(flat), step):
            rows = slice(first, first + step)
            # No class equals -1, whose one-hot is all zero.
            yield rows, (flat[rows].unsqueeze(-1) == known).flatten(1).to(dtype)

    @staticmethod
    def forward(ctx: Any, patches: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        device = weight.device.type
        ctx.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        ctx.classes = len(weight) // patches.shape[2]
        ctx.save_for_backward(patches)
        table = weight.to(ctx.dtype)
        products = [one_hot @ table for _, one_hot in OneHotProduct._pieces(patches, ctx.classes, ctx.dtype)]
        return torch.cat(products).view(*patches.shape[:2], -1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, torch.Tensor]:
        (patches,) = ctx.saved_tensors
        flat = gradient.flatten(0, 1).to(ctx.dtype)
        total = flat.new_zeros(patches.shape[2] * ctx.classes, flat.shape[1], dtype=torch.float32)
        # As another type: the compiler would else see that these are the forward pass's pieces, and keep all of those.
        for rows, one_hot in OneHotProduct._pieces(patches.int(), ctx.classes, ctx.dtype):
            total += one_hot.T @ flat[rows]
        return None, total


def bag_of_rows(patches: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The same as a sum of table rows: (B, N, p*p) and (p*p * C, D) -> (B, N, D)."""
    b, n, pixels = patches.shape
    classes = patches.long()
    rows = classes.clamp_min(0) + torch.arange(pixels, device=patches.device) * (len(weight) // pixels)
    present = (classes >= 0).to(weight.dtype)
    summed = F.embedding_bag(rows.view(-1, pixels), weight, mode="sum", per_sample_weights=present.view(-1, pixels))
    return summed.view(b, n, -1)


class CategoricalEmbed(nn.Module):
    """Linear map of a patch's one-hot labels. A label of -1 adds nothing, as an all-zero one-hot would."""

    def __init__(self, num_classes: int, pixels: int, dim: int) -> None:
        super().__init__()
        # Row (pixel * classes + class); the deviation is that of a linear map with pixels * classes inputs.
        self.weight = nn.Parameter(torch.randn(pixels * num_classes, dim) * (pixels * num_classes) ** -0.5)
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """(B, N, p*p) integer classes -> (B, N, D)."""
        # Measured by tools/label_embeddings.py.
        product = OneHotProduct.apply if patches.is_cuda else bag_of_rows
        return product(patches, self.weight) + self.bias


class RealEmbed(nn.Module):
    """Linear map of a patch's real label values: (B, N, p*p, C) -> (B, N, D)."""

    def __init__(self, channels: int, pixels: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(pixels * channels, dim)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        return self.proj(patches.flatten(2))


class LabelEmbed(nn.Module):
    """Sum over label channels of each channel's embedding: labels at (B, S, S[, C]) -> (B, N, D)."""

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


class LabelHead(nn.Module):
    """One zero-initialised linear map per label channel: (B, N, D) -> channel -> (B, N, p*p, C)."""

    def __init__(self, channels: Mapping[str, LabelChannel], patch: int, dim: int) -> None:
        super().__init__()
        self.pixels = patch * patch
        self.heads = nn.ModuleDict()
        sizes = {name: c.channels if isinstance(c, Real) else c.num_classes for name, c in channels.items()}
        #: Numbers that one patch gets from all channels.
        self.logits = self.pixels * sum(sizes.values())
        for name, size in sizes.items():
            head = nn.Linear(dim, self.pixels * size)
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
            self.heads[name] = head

    def forward(self, hidden: torch.Tensor) -> dict[str, torch.Tensor]:
        b, n, _ = hidden.shape
        return {name: head(hidden).view(b, n, self.pixels, -1) for name, head in self.heads.items()}


def cut(length: int, most: int) -> list[slice]:
    """0..length in the fewest slices of at most `most` (but at least one) each, as even as can be."""
    count = -(-length // max(1, most))
    size = -(-length // count)
    return [slice(first, min(first + size, length)) for first in range(0, length, size)]


def affordable(length: int, logits: int) -> list[slice]:
    """0..length in slices that hold at most `BUDGET` logits, of `logits` for each index."""
    return cut(length, BUDGET // logits)


def head_and_loss(
    head: LabelHead, hidden: torch.Tensor, labels: Mapping[str, torch.Tensor], loss: Loss
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Task loss of hidden states (B, N, D) against patchified labels, in pieces of at most `BUDGET` logits.

    A piece is some examples, or some patches of one example. With several pieces each one's logits are thrown away
    and recomputed in the backward pass, so that peak memory does not grow with classes x pixels x batch. The loss of an
    example is a mean over its pixels, hence the mean of its pieces' means weighted by their size.

    Args:
        labels: channel -> (B, N, p*p) or (B, N, p*p, C).

    Returns:
        (B,) float32 loss and the task's logs, each (B,).
    """

    device = hidden.device.type
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)

    def piece(h: torch.Tensor, part: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        # One cast of the weights that all pieces share would add up their gradients in its own low precision.
        with torch.autocast(device, dtype, enabled, cache_enabled=False):
            logits = {name: x.float().flatten(1, 2) for name, x in head(h).items()}
        return loss(logits, {name: x.flatten(1, 2) for name, x in part.items()})

    b, n, _ = hidden.shape
    examples, patches = affordable(b, n * head.logits), affordable(n, head.logits)
    if len(examples) * len(patches) == 1:
        return piece(hidden, dict(labels))
    rows: list[dict[str, torch.Tensor]] = []
    for some in examples:
        row: dict[str, torch.Tensor] = {}
        for few in patches:
            part = {name: x[some, few] for name, x in labels.items()}
            value, logs = checkpoint(piece, hidden[some, few], part, use_reentrant=False)  # type: ignore[misc]
            weight = (few.stop - few.start) / n
            for name, x in {"": value, **logs}.items():
                row[name] = row[name] + x * weight if name in row else x * weight
        rows.append(row)
    means = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    return means.pop(""), means
