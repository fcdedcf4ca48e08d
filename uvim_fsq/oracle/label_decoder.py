"""The half of an oracle that turns codes and the image into labels, and a copy of it that stage II trains.

B batch, S image side, N patches, L code length, d code channels, D width, C classes or channels of a label map, M and E
number and width of the token model's image features. Images are (B, 3, S, S), either uint8 or floating point in
[-1, 1].
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from uvim_fsq.config.schema import OracleModelConfig
from uvim_fsq.layers import Layered, PatchEmbed, resize_tokens, signed_pixels
from uvim_fsq.oracle.backbones.transformer import Transformer
from uvim_fsq.oracle.chunking import chunk_slices
from uvim_fsq.oracle.label_head import LabelHead, Loss


class LabelDecoder(nn.Module, Layered):
    """Decodes codes to label logits. Subclasses create the modules.

    Attributes:
        config: the oracle's architecture.
        num_patches: N.
        code_dim: d.
        marks_dropped: whether codes get a presence channel (`model.dropped_code: learned`).
        feature_projection: maps image features of a token model to D; None if the decoder does not see them.
    """

    config: OracleModelConfig
    num_patches: int
    code_dim: int
    marks_dropped: bool
    decoder_stem: nn.Linear
    decoder_context: PatchEmbed | None
    decoder_positions: nn.Parameter
    decoder: Transformer
    label_head: LabelHead
    feature_projection: nn.Linear | None

    def layer_order(self) -> list[list[nn.Module | nn.Parameter | None]]:
        first: list[nn.Module | nn.Parameter | None] = [self.decoder_positions, self.decoder_context, self.decoder_stem]
        return [first, *self.decoder.layers()]

    @property
    def code_length(self) -> int:
        """L."""
        return self.config.code_length

    def embed_context(self, embed: PatchEmbed | None, image: torch.Tensor | None) -> torch.Tensor | float:
        """The embedded patches of the image (B, N, D), or 0 if the half that `embed` belongs to does not see it."""
        if embed is None:
            return 0.0
        if image is None:
            raise ValueError(f"an oracle with context={self.config.context} needs the image")
        return embed(signed_pixels(image))

    def mark_present(self, codes: torch.Tensor) -> torch.Tensor:
        """Appends the presence channel, which is 1, if the decoder has one: (B, L, d) -> (B, L, d + 1).

        A dropped code is zero in all channels (`empty_codes`), so multiplying the result by s in [0, 1] moves it from a
        dropped code to a present one. Codes are returned unchanged if they have the channel already or the decoder has
        none, i.e. with `dropped_code="zero"`.
        """
        if not self.marks_dropped or codes.shape[-1] > self.code_dim:
            return codes
        return torch.cat([codes, torch.ones_like(codes[..., :1])], -1)

    def empty_codes(self, count: int) -> torch.Tensor:
        """The input of the decoder if all codes of `count` images are dropped: (count, L, d) zeros, or (.., d + 1)."""
        channels = self.decoder_stem.in_features
        return torch.zeros(count, self.code_length, channels, device=self.decoder_positions.device)

    def decode_hidden(
        self, codes: torch.Tensor, image: torch.Tensor | None = None, features: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Codes (B, L, d), image and image features (B, M, E) -> hidden states (B, N, D) before the label heads."""
        x = resize_tokens(self.decoder_stem(self.mark_present(codes)), self.num_patches)
        x = x + self.embed_context(self.decoder_context, image) + self.decoder_positions
        if self.feature_projection is not None:
            if features is None:
                raise ValueError("this decoder needs the token model's image features")
            x = x + resize_tokens(self.feature_projection(features), self.num_patches)
        return self.decoder(x)

    def decode(
        self, codes: torch.Tensor, image: torch.Tensor | None = None, features: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Codes (B, L, d) and image -> channel -> logits (B, S, S, C) float32. `empty_codes` leave only the context."""
        return self.logits(self.decode_hidden(codes, image, features))

    def logits(self, hidden: torch.Tensor) -> dict[str, torch.Tensor]:
        """Hidden states (B, N, D) -> channel -> logits (B, S, S, C) float32."""
        return self.label_head.maps(hidden)

    def image_chunks(self, count: int) -> list[slice]:
        """Slices of `count` images that have few enough logits to be in memory together; see `iter_logits`."""
        return chunk_slices(count, self.num_patches * self.label_head.logits)

    def iter_logits(
        self, codes: torch.Tensor, image: torch.Tensor | None, features: torch.Tensor | None = None
    ) -> Iterator[dict[str, torch.Tensor]]:
        """Like `decode`, but yields a few images at a time, in order, to limit the memory that logits take."""
        yield from self.label_head.iter_maps(self.decode_hidden(codes, image, features))

    def label_loss(
        self,
        codes: torch.Tensor,
        labels: Mapping[str, torch.Tensor],
        image: torch.Tensor | None,
        loss: Loss,
        image_loss: Loss | None = None,
        features: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The task's loss of the labels decoded from codes, which may be soft: (B,) float32, and logs name -> (B,).

        Args:
            codes: (B, L, d).
            labels: channel -> (B, S, S[, C]).
            image: the context; may be None for a decoder without context.
            loss: `Task.loss`, computed in chunks of examples and patches.
            image_loss: `Task.image_loss`, added to `loss`. It needs the logits of whole label maps at once.
            features: the token model's image features (B, M, E), for a decoder that sees them.
        """
        return self.label_head.loss(self.decode_hidden(codes, image, features), labels, loss, image_loss)


class TrainedDecoder(LabelDecoder):
    """A copy of an oracle's decoder for stage II to train, which starts out with the same predictions.

    It may also see the token model's image features: they are projected, resized to the decoder's patches and added to
    its input, where the projection starts at zero.

    Args:
        oracle: the oracle.
        num_features: E; None for a decoder that sees only codes and pixels, like the oracle's.
    """

    def __init__(self, oracle: LabelDecoder, num_features: int | None = None) -> None:
        super().__init__()
        self.config, self.num_patches = oracle.config, oracle.num_patches
        self.code_dim, self.marks_dropped = oracle.code_dim, oracle.marks_dropped
        self.decoder_stem = copy.deepcopy(oracle.decoder_stem)
        self.decoder_context = copy.deepcopy(oracle.decoder_context)
        self.decoder_positions = copy.deepcopy(oracle.decoder_positions)
        self.decoder = copy.deepcopy(oracle.decoder)
        self.label_head = copy.deepcopy(oracle.label_head)
        self.requires_grad_(True)
        self.feature_projection = None
        if num_features is not None:
            self.feature_projection = nn.Linear(num_features, oracle.config.width)
            nn.init.zeros_(self.feature_projection.weight)
            nn.init.zeros_(self.feature_projection.bias)
