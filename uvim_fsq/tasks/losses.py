"""Losses that several tasks share."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def pixel_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy per pixel and its mean over ALL pixels; a label of -1 counts 0 but stays in the mean (UViM).

    Args:
        logits: (B, P, C) float32.
        labels: (B, P) integers.

    Returns:
        (B,) loss, and (B,) share of pixels whose argmax is right.
    """
    target = labels.long()
    loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=-1, reduction="none")
    right = (logits.detach().argmax(-1) == target).float()
    return loss.view(target.shape).mean(1), right.mean(1)
