"""The oracle (UViM, arXiv 2205.10337, stage I): an autoencoder of label maps with a discrete bottleneck.

The encoder compresses the labels into L tokens and the decoder reconstructs the labels from them. Both may also see
the image, which is then called context.

B batch, S image side, N patches, L code length, d code channels, D width, C classes or channels of a label map.
Images are (B, 3, S, S), either uint8 or floating point in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from uvim_fsq.config.rules import check_code_length, check_patches
from uvim_fsq.config.schema import OracleModelConfig
from uvim_fsq.layers import (
    PatchEmbed,
    init_transformer_,
    patchify,
    position_embedding,
    resize_tokens,
    signed_pixels,
    unpatchify,
)
from uvim_fsq.oracle.backbones.transformer import Transformer
from uvim_fsq.oracle.chunking import chunk_slices
from uvim_fsq.oracle.label_embedding import LabelEmbed
from uvim_fsq.oracle.label_head import LabelHead, Loss, chunked_label_loss
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


class Oracle(nn.Module):
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
        self.decoder_stem = nn.Linear(self.quantizer.dim, width)
        for stem in (self.encoder_head, self.decoder_stem):
            init_transformer_(stem)
        self.label_head = LabelHead(channels, patch, width)
        self.num_patches = num_patches

    @property
    def code_length(self) -> int:
        """L."""
        return self.config.code_length

    def cost(self) -> OracleCost:
        """Floating-point operations per image, by part."""
        logits = self.label_head.logits // self.config.patch_size**2
        return oracle_cost(self.config, logits, self.image_size, self.quantizer.dim)

    def _context(self, embed: PatchEmbed | None, image: torch.Tensor | None) -> torch.Tensor | float:
        if embed is None:
            return 0.0
        if image is None:
            raise ValueError(f"an oracle with context={self.config.context} needs the image")
        return embed(signed_pixels(image))

    def encode(self, labels: Mapping[str, torch.Tensor], image: torch.Tensor | None = None) -> torch.Tensor:
        """Labels (B, S, S[, C]) and image -> continuous z (B, L, d), the input of the quantizer."""
        x = self.label_embed(labels) + self._context(self.encoder_context, image) + self.encoder_positions
        return self.encoder_head(resize_tokens(self.encoder(x), self.code_length))

    def tokenize(self, labels: Mapping[str, torch.Tensor], image: torch.Tensor | None = None) -> torch.Tensor:
        """Labels and image -> tokens (B, L) int64.

        Always computed in float32, even inside autocast, so that an LM is trained and evaluated on the same tokens.
        """
        with torch.autocast(self.encoder_positions.device.type, enabled=False):
            return self.quantizer(self.encode(labels, image)).indices

    def decode_hidden(self, codes: torch.Tensor, image: torch.Tensor | None = None) -> torch.Tensor:
        """Codes (B, L, d) and image -> hidden states (B, N, D) before the label heads."""
        x = resize_tokens(self.decoder_stem(codes), self.num_patches)
        return self.decoder(x + self._context(self.decoder_context, image) + self.decoder_positions)

    def decode(self, codes: torch.Tensor, image: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Codes (B, L, d) and image -> channel -> logits (B, S, S, C) float32."""
        return self.logits(self.decode_hidden(codes, image))

    def logits(self, hidden: torch.Tensor) -> dict[str, torch.Tensor]:
        """Hidden states (B, N, D) -> channel -> logits (B, S, S, C) float32."""
        return {name: unpatchify(x.float(), self.config.patch_size) for name, x in self.label_head(hidden).items()}

    def empty_codes(self, count: int) -> torch.Tensor:
        """What the decoder gets for codes that are all dropped: (count, L, d) float32. It leaves only the context."""
        return torch.zeros(count, self.code_length, self.quantizer.dim, device=self.encoder_positions.device)

    def image_chunks(self, count: int) -> list[slice]:
        """Slices of `count` images whose logits together are few enough for the memory; see `iter_logits`."""
        return chunk_slices(count, self.num_patches * self.label_head.logits)

    def iter_logits(self, codes: torch.Tensor, image: torch.Tensor | None) -> Iterator[dict[str, torch.Tensor]]:
        """Like `decode`, but yields a few images at a time, in order, to limit the memory that logits take."""
        hidden = self.decode_hidden(codes, image)
        for rows in self.image_chunks(len(hidden)):
            yield self.logits(hidden[rows])

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
            loss: `Task.loss`, computed in chunks of examples and patches.
            image_loss: `Task.image_loss`, added to `loss`. It needs the logits of whole label maps at once.
        """
        bottleneck = self.encode(labels, image)
        quantized = self.quantizer(bottleneck)
        codes = drop_codes(quantized.codes, self.config.code_dropout) if self.training else quantized.codes
        hidden = self.decode_hidden(codes, image)
        patches = {name: patchify(x, self.config.patch_size) for name, x in labels.items()}
        value, logs = chunked_label_loss(self.label_head, hidden, patches, loss)
        if image_loss is not None:
            image_value, image_logs = image_loss(self.logits(hidden), labels)
            value, logs = value + image_value, {**logs, **image_logs}
        if quantized.loss is not None:
            logs = {**logs, "reconstruction": value.detach(), **(quantized.logs or {})}
            value = value + quantized.loss
        return OracleOutput(value, logs, quantized.indices, bottleneck.detach())
