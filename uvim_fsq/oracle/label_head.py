"""The oracle's output: hidden states to label logits, and the task loss computed in chunks.

B batch, N patches, p patch side, C classes or channels, D width. Logits are channel-last: (B, N, p*p, C).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from uvim_fsq.oracle.chunking import chunk_slices
from uvim_fsq.tasks.base import LabelChannel, Real

Loss = Callable[[Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]], tuple[torch.Tensor, dict[str, torch.Tensor]]]


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


def chunked_label_loss(
    head: LabelHead, hidden: torch.Tensor, labels: Mapping[str, torch.Tensor], loss: Loss
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Task loss of hidden states (B, N, D) against patchified labels, in pieces of at most `MAX_LOGITS` logits.

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
    examples, patches = chunk_slices(b, n * head.logits), chunk_slices(n, head.logits)
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
