"""Moves a batch to a device."""

from __future__ import annotations

import torch

from uvim_fsq.data.sample import Batch
from uvim_fsq.layers import signed_pixels


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Moves image and labels to `device`; converts uint8 real labels (B, S, S, C) to float32 in [-1, 1].

    Ids and indices stay on the host.
    """
    labels = {name: x.to(device, non_blocking=True) for name, x in batch["labels"].items()}
    labels = {n: signed_pixels(x) if x.ndim == 4 else x for n, x in labels.items()}
    return Batch(
        image=batch["image"].to(device, non_blocking=True), labels=labels, index=batch["index"], id=batch["id"]
    )
