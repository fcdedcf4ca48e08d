"""The direct baseline: what the token model's image encoder reaches with a label head alone.

It predicts labels from the image in one pass and is trained on the task's loss only. It has no oracle, no tokens and no
choice between possible answers, so it tells what the detour through tokens is worth.

B batch, S image side, E encoder width, N label patches, D width of the blocks, C classes or channels of a label map.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from uvim_fsq.config.rules import check_patches
from uvim_fsq.config.schema import DirectModelConfig
from uvim_fsq.layers import Layered, init_transformer_, position_embedding, resize_grid
from uvim_fsq.lm.image_encoder import build_image_encoder
from uvim_fsq.oracle.backbones.transformer import Transformer
from uvim_fsq.oracle.label_head import LabelHead, Loss
from uvim_fsq.performance.flops import DirectCost, direct_cost
from uvim_fsq.performance.memory import direct_activations
from uvim_fsq.tasks.base import LabelChannel


class DirectModel(nn.Module, Layered):
    """Image encoder, transformer blocks on the grid of label patches, label head.

    Args:
        config: the architecture.
        channels: the task's label channels by name.
        image_size: S.

    Raises UserError if S is not a multiple of the label patch, and for an encoder that cannot be built.
    """

    def __init__(self, config: DirectModelConfig, channels: Mapping[str, LabelChannel], image_size: int) -> None:
        super().__init__()
        check_patches(image_size, config.patch_size)
        self.config, self.image_size = config, image_size
        side = image_size // config.patch_size
        self.grid, self.num_patches = (side, side), side * side
        self.encoder = build_image_encoder(config.encoder, image_size)
        self.stem = nn.Linear(self.encoder.num_features, config.width)
        init_transformer_(self.stem)
        self.positions = position_embedding(self.num_patches, config.width)
        self.blocks = Transformer(config.width, config.depth, config.num_heads, config.mlp_dim)
        self.label_head = LabelHead(channels, config.patch_size, config.width)

    def layer_order(self) -> list[list[nn.Module | nn.Parameter | None]]:
        return [[self.stem, self.positions], *self.blocks.layers()]

    def hidden(self, image: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, S, S), uint8 or floating point in [-1, 1] -> hidden states (B, N, D) before the label head."""
        x = resize_grid(self.stem(self.encoder(image)), self.encoder.grid, self.grid)
        return self.blocks(x + self.positions)

    def logits(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        """Images (B, 3, S, S) -> channel -> logits (B, S, S, C) float32."""
        return self.label_head.maps(self.hidden(image))

    def iter_logits(self, image: torch.Tensor) -> Iterator[dict[str, torch.Tensor]]:
        """Images (B, 3, S, S) -> channel -> logits (b, S, S, C) float32, a few images b at a time, in order."""
        yield from self.label_head.iter_maps(self.hidden(image))

    def forward(
        self,
        labels: Mapping[str, torch.Tensor],
        image: torch.Tensor,
        loss: Loss,
        image_loss: Loss | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The task's loss (B,) float32 of the predictions against labels (B, S, S[, C]), and its logs, each (B,).

        `loss` and `image_loss` are those of the task, as for the oracle.
        """
        return self.label_head.loss(self.hidden(image), labels, loss, image_loss)

    def cost(self) -> DirectCost:
        """Floating-point operations per image, by part."""
        logits = self.label_head.logits // self.config.patch_size**2
        return direct_cost(self.encoder.cost(), self.config, logits, self.image_size)

    def activation_bytes(self, number_bytes: int) -> float:
        """Bytes of activations per image kept for the backward pass, without label logits."""
        features = (self.encoder.num_patches, self.encoder.num_features)
        encoder = self.encoder.activation_bytes(number_bytes)
        return direct_activations(encoder, features, self.config, self.image_size, number_bytes)
