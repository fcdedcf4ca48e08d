"""Losses shared by several tasks.

Shapes: B batch, P pixels, C classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def pixel_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy averaged over all pixels. Pixels labeled -1 contribute 0, but count in the mean, as in UViM.

    Args:
        logits: (B, P, C) float32.
        labels: (B, P) integers in [-1, C).

    Returns:
        (B,) float32 loss, and (B,) float32 fraction of pixels whose argmax equals the label.
    """
    target = labels.long()
    loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=-1, reduction="none")
    right = (logits.detach().argmax(-1) == target).float()
    return loss.view(target.shape).mean(1), right.mean(1)
