"""The output layer, which maps hidden states to label logits, and the task loss computed in chunks.

B batch, N patches, p patch side, S label side, C classes or channels, D width. Logits are channel-last: (B, N, p*p, C).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from uvim_fsq.layers import patchify, unpatchify
from uvim_fsq.oracle.chunking import chunk_slices
from uvim_fsq.tasks.base import LabelChannel, Real

Loss = Callable[[Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]], tuple[torch.Tensor, dict[str, torch.Tensor]]]


class LabelHead(nn.Module):
    """One zero-initialized linear map per label channel: (B, N, D) -> channel -> (B, N, p*p, C)."""

    def __init__(self, channels: Mapping[str, LabelChannel], patch: int, dim: int) -> None:
        super().__init__()
        self.patch, self.pixels = patch, patch * patch
        self.heads = nn.ModuleDict()
        sizes = {name: c.channels if isinstance(c, Real) else c.num_classes for name, c in channels.items()}
        #: Logits per patch, over all channels.
        self.logits = self.pixels * sum(sizes.values())
        for name, size in sizes.items():
            head = nn.Linear(dim, self.pixels * size)
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
            self.heads[name] = head

    def forward(self, hidden: torch.Tensor) -> dict[str, torch.Tensor]:
        b, n, _ = hidden.shape
        return {name: head(hidden).view(b, n, self.pixels, -1) for name, head in self.heads.items()}

    def maps(self, hidden: torch.Tensor) -> dict[str, torch.Tensor]:
        """Hidden states (B, N, D) of a square grid -> channel -> logits (B, S, S, C) float32."""
        return {name: unpatchify(x.float(), self.patch) for name, x in self(hidden).items()}

    def iter_maps(self, hidden: torch.Tensor) -> Iterator[dict[str, torch.Tensor]]:
        """Like `maps`, but yields a few images at a time, in order, to limit the memory that logits take."""
        for rows in chunk_slices(len(hidden), hidden.shape[1] * self.logits):
            yield self.maps(hidden[rows])

    def loss(
        self,
        hidden: torch.Tensor,
        labels: Mapping[str, torch.Tensor],
        loss: Loss,
        image_loss: Loss | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of hidden states (B, N, D) against labels (B, S, S[, C]): (B,) float32, and logs, each (B,).

        Args:
            hidden: of a square grid.
            labels: by channel.
            loss: `Task.loss`, computed in chunks of examples and patches.
            image_loss: `Task.image_loss`, added to `loss`. It needs the logits of whole label maps at once.
        """
        patches = {name: patchify(x, self.patch) for name, x in labels.items()}
        value, logs = chunked_label_loss(self, hidden, patches, loss)
        if image_loss is not None:
            image_value, image_logs = image_loss(self.maps(hidden), labels)
            value, logs = value + image_value, {**logs, **image_logs}
        return value, logs


def chunked_label_loss(
    head: LabelHead, hidden: torch.Tensor, labels: Mapping[str, torch.Tensor], loss: Loss
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Task loss of hidden states against patchified labels, in chunks of at most `MAX_LOGITS` logits.

    A chunk consists of several examples, or of several patches of one example. If there is more than one chunk, the
    logits are discarded and recomputed in the backward pass, so that peak memory does not grow with
    classes x pixels x batch. The loss of an example is a mean over its pixels. It therefore equals the mean of the
    losses of its chunks, weighted by chunk size.

    Args:
        head: the output layer.
        hidden: (B, N, D).
        labels: channel -> (B, N, p*p) or (B, N, p*p, C).
        loss: `Task.loss`.

    Returns:
        (B,) float32 loss and the task's logs, each (B,).
    """
    device = hidden.device.type
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)

    def chunk_loss(h: torch.Tensor, part: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        # A cached cast of the weights, shared by all chunks, would accumulate their gradients in low precision.
        with torch.autocast(device, dtype, enabled, cache_enabled=False):
            logits = {name: x.float().flatten(1, 2) for name, x in head(h).items()}
        return loss(logits, {name: x.flatten(1, 2) for name, x in part.items()})

    b, n, _ = hidden.shape
    examples, patches = chunk_slices(b, n * head.logits), chunk_slices(n, head.logits)
    if len(examples) * len(patches) == 1:
        return chunk_loss(hidden, dict(labels))
    rows: list[dict[str, torch.Tensor]] = []
    for batch_slice in examples:
        row: dict[str, torch.Tensor] = {}
        for patch_slice in patches:
            part = {name: x[batch_slice, patch_slice] for name, x in labels.items()}
            chunk = hidden[batch_slice, patch_slice]
            value, logs = checkpoint(chunk_loss, chunk, part, use_reentrant=False)  # type: ignore[misc]
            weight = (patch_slice.stop - patch_slice.start) / n
            for name, x in {"": value, **logs}.items():
                row[name] = row[name] + x * weight if name in row else x * weight
        rows.append(row)
    means = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    return means.pop(""), means
