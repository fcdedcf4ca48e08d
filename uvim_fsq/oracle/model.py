"""The oracle (UViM, arXiv 2205.10337, stage I): an autoencoder of label maps with a discrete bottleneck.

The encoder compresses the labels into L tokens and the decoder reconstructs the labels from them. Both may also see
the image, which is then called context.

B batch, S image side, N patches, L code length, d code channels, D width, C classes or channels of a label map.
Images are (B, 3, S, S), either uint8 or floating point in [-1, 1].
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from uvim_fsq.config.rules import check_code_length, check_patches
from uvim_fsq.config.schema import OracleModelConfig
from uvim_fsq.layers import PatchEmbed, init_transformer_, position_embedding, resize_tokens
from uvim_fsq.oracle.backbones.transformer import Transformer
from uvim_fsq.oracle.label_decoder import LabelDecoder
from uvim_fsq.oracle.label_embedding import LabelEmbed
from uvim_fsq.oracle.label_head import LabelHead, Loss
from uvim_fsq.oracle.quantizers.base import build_quantizer
from uvim_fsq.performance.flops import OracleCost, oracle_cost
from uvim_fsq.tasks.base import LabelChannel


@dataclass
class OracleOutput:
    """The result of one reconstruction pass.

    Attributes:
        loss: (B,) float32.
        logs: name -> (B,) tensor.
        tokens: (B, L) int64, taken before code dropout.
        bottleneck: (B, L, d), the detached input of the quantizer.
    """

    loss: torch.Tensor
    logs: dict[str, torch.Tensor]
    tokens: torch.Tensor
    bottleneck: torch.Tensor


def drop_codes(codes: torch.Tensor, kind: str) -> torch.Tensor:
    """Code dropout (UViM): zeroes the codes whose importance is at most a threshold u ~ U[0, 1] per example.

    Args:
        codes: (B, L, d) quantized codes. Tokens are always taken before code dropout.
        kind: "none" returns the codes unchanged. "random" assigns the importances to positions by a random permutation
            per example, as the UViM reference code (big_vision, JAX) does. "ordered" lets the importance decrease with
            the position, so that the first codes learn to carry the most information.
    """
    if kind == "none":
        return codes
    b, length, _ = codes.shape
    importance = torch.linspace(1.0, 0.0, length + 2, device=codes.device)[1:-1].expand(b, -1)
    if kind == "random":
        order = torch.rand(b, length, device=codes.device).argsort(dim=1)
        importance = importance.gather(1, order)
    threshold = torch.rand(b, 1, device=codes.device)
    return codes * (importance > threshold).to(codes.dtype).unsqueeze(-1)


class Oracle(LabelDecoder):
    """The stage I autoencoder. With `context="none"` it never sees the image.

    Args:
        config: the architecture.
        channels: the task's label channels by name.
        image_size: S.

    Raises UserError if S is not a multiple of the patch size or the code length is not a square number.
    """

    def __init__(self, config: OracleModelConfig, channels: Mapping[str, LabelChannel], image_size: int) -> None:
        super().__init__()
        check_patches(image_size, config.patch_size)
        check_code_length(config.code_length)
        self.config = config
        self.image_size = image_size
        width, patch = config.width, config.patch_size
        num_patches = (image_size // patch) ** 2
        self.quantizer = build_quantizer(config.quantizer)
        self.label_embed = LabelEmbed(channels, patch, width)
        self.encoder_context = PatchEmbed(patch, width) if config.context in ("both", "encoder") else None
        self.decoder_context = PatchEmbed(patch, width) if config.context in ("both", "decoder") else None
        self.encoder_positions = position_embedding(num_patches, width)
        self.decoder_positions = position_embedding(num_patches, width)
        self.encoder = Transformer(width, config.encoder_depth, config.num_heads, config.mlp_dim)
        self.decoder = Transformer(width, config.decoder_depth, config.num_heads, config.mlp_dim)
        self.encoder_head = nn.Linear(width, self.quantizer.dim)
        self.code_dim = self.quantizer.dim
        self.marks_dropped = config.dropped_code == "learned"
        self.decoder_stem = nn.Linear(self.quantizer.dim + self.marks_dropped, width)
        for stem in (self.encoder_head, self.decoder_stem):
            init_transformer_(stem)
        self.label_head = LabelHead(channels, patch, width)
        self.num_patches = num_patches
        self.feature_projection = None

    def layer_order(self) -> list[list[nn.Module | nn.Parameter | None]]:
        first: list[nn.Module | nn.Parameter | None] = [self.encoder_positions, self.encoder_context]
        encoder = self.encoder.layers()
        return [first, *encoder[:-1], [*encoder[-1], self.encoder_head], *super().layer_order()]

    def without_encoder(self) -> Oracle:
        """An oracle that shares this one's weights, but has only those that `decode` needs."""
        half = copy.copy(self)
        half._modules, half._parameters = dict(self._modules), dict(self._parameters)
        for name in ("label_embed", "encoder_context", "encoder", "encoder_head", "encoder_positions"):
            setattr(half, name, None)
        return half

    def cost(self) -> OracleCost:
        """Floating-point operations per image, by part."""
        logits = self.label_head.logits // self.config.patch_size**2
        return oracle_cost(self.config, logits, self.image_size, self.quantizer.dim)

    def encode(self, labels: Mapping[str, torch.Tensor], image: torch.Tensor | None = None) -> torch.Tensor:
        """Labels (B, S, S[, C]) and image -> continuous z (B, L, d), the input of the quantizer."""
        x = self.label_embed(labels) + self.embed_context(self.encoder_context, image) + self.encoder_positions
        return self.encoder_head(resize_tokens(self.encoder(x), self.code_length))

    def tokenize(self, labels: Mapping[str, torch.Tensor], image: torch.Tensor | None = None) -> torch.Tensor:
        """Labels and image -> tokens (B, L) int64.

        Always computed in float32, even inside autocast, so that an LM is trained and evaluated on the same tokens.
        """
        with torch.autocast(self.encoder_positions.device.type, enabled=False):
            return self.quantizer(self.encode(labels, image)).indices

    def detokenize(self, tokens: torch.Tensor, image: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Tokens (B, L) int64 and image -> channel -> logits (B, S, S, C) float32."""
        return self.decode(self.quantizer.indices_to_codes(tokens), image)

    def forward(
        self,
        labels: Mapping[str, torch.Tensor],
        image: torch.Tensor | None,
        loss: Loss,
        image_loss: Loss | None = None,
    ) -> OracleOutput:
        """One reconstruction pass. Code dropout applies in training mode only.

        Args:
            labels: channel -> (B, S, S[, C]).
            image: the context; may be None for an oracle without context.
            loss: see `label_loss`.
            image_loss: see `label_loss`.
        """
        bottleneck = self.encode(labels, image)
        quantized = self.quantizer(bottleneck)
        codes = self.mark_present(quantized.codes)
        if self.training:
            codes = drop_codes(codes, self.config.code_dropout)
        value, logs = self.label_loss(codes, labels, image, loss, image_loss)
        if quantized.loss is not None:
            logs = {**logs, "reconstruction": value.detach(), **(quantized.logs or {})}
            value = value + quantized.loss
        return OracleOutput(value, logs, quantized.indices, bottleneck.detach())
