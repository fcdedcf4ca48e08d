"""Features of any timm model. Shapes: B batch; H, W image size; D features."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from uvim_fsq.compilation import compiler_unloaded
from uvim_fsq.data.published_weights import Keys, create_published
from uvim_fsq.errors import UserError


class TimmFeatures:
    """The pooled features before the classifier of a timm model with its published weights, in float32.

    Images are resized to the model's own input size, with antialiasing and the interpolation it was trained with, and
    are never cropped.
    """

    def __init__(self, name: str, weights: str, device: torch.device) -> None:
        """Args: `name` of the model; `weights`, see `ImagenetColorConfig.features_weights`.

        Raises UserError for an unknown model and for weights that are missing or do not fit.
        """
        with compiler_unloaded():
            import timm

        if not timm.is_model(name):
            raise UserError(f"task.features={name} is not a timm model")
        model, mean, std = create_published(name, weights, Keys("task.features", "task.features_weights"))
        self.name, self.sha256, self.device = name, _hash(model), device
        self.model: Any = model.eval().requires_grad_(False).to(device)
        cfg: Any = model.pretrained_cfg
        self.size: tuple[int, int] = tuple(cfg["input_size"][-2:])
        self.interpolation = "bilinear" if cfg["interpolation"] == "bilinear" else "bicubic"
        self.mean, self.std = (torch.tensor(x, device=device).view(3, 1, 1) for x in (mean, std))
        self.dim = int(self.features(np.zeros((1, 8, 8, 3), np.uint8)).shape[1])

    @torch.inference_mode()
    def features(self, images: np.ndarray) -> np.ndarray:
        """(B, H, W, 3) uint8 RGB -> (B, D) float64."""
        batch = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).to(self.device).float() / 255
        batch = F.interpolate(batch, self.size, mode=self.interpolation, antialias=True).clamp(0, 1)
        # With TF32 or bfloat16, the features and so the distance would depend on the device.
        with (
            torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False),
            torch.autocast(self.device.type, enabled=False),
        ):
            # With channels last, depthwise convolutions on a CPU are 1.6 times as fast.
            batch = ((batch - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
            features = self.model.forward_features(batch)
            pooled = self.model.forward_head(features, pre_logits=True)
        return pooled.double().cpu().numpy()


def _hash(model: torch.nn.Module) -> str:
    """SHA-256 of all parameters and buffers, by name."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode() + b"\0" + value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
