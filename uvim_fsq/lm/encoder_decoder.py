"""What the built-in token models share: an image encoder, and a transformer decoder that attends to its output.

B batch, S image side, M memory tokens, E encoder width, L code length, V vocabulary, D decoder width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from uvim_fsq.config.schema import LMModelConfig
from uvim_fsq.layers import LN_EPS, Layered, init_transformer_, position_embedding
from uvim_fsq.lm.base import TokenModel
from uvim_fsq.lm.decoder_block import DecoderBlock
from uvim_fsq.lm.image_encoder import build_image_encoder
from uvim_fsq.performance.memory import encoder_decoder_activations


class EncoderDecoder(TokenModel, Layered):
    """An image encoder and a decoder of `DecoderBlock`s over the embedded tokens.

    Args:
        causal: whether a position attends only to itself and earlier ones.
        symbol: the attribute name of a learned vector (1, 1, D) that stands in for tokens that are not known. It is
            outside the vocabulary, so every output is a valid code.
    """

    def __init__(
        self, config: LMModelConfig, *, image_size: int, vocab_size: int, length: int, causal: bool, symbol: str
    ) -> None:
        super().__init__(config, image_size=image_size, vocab_size=vocab_size, length=length)
        self.encoder = build_image_encoder(config.encoder, image_size)
        dim = config.width
        self.token_embedding = nn.Embedding(vocab_size, dim)
        self.register_parameter(symbol, nn.Parameter(torch.randn(1, 1, dim)))
        self.positions = position_embedding(length, dim)
        self.dropout = nn.Dropout(config.dropout)
        memory_dim = self.encoder.num_features
        self.blocks = nn.ModuleList(DecoderBlock(config, memory_dim, causal=causal) for _ in range(config.depth))
        init_transformer_(self.blocks)
        self.norm = nn.LayerNorm(dim, eps=LN_EPS)
        self.head = nn.Linear(dim, vocab_size)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def layer_order(self) -> list[list[nn.Module | nn.Parameter | None]]:
        blocks: list[list[nn.Module | nn.Parameter | None]] = [[block] for block in self.blocks]
        return [[self.positions], *blocks[:-1], [*blocks[-1], self.norm]]

    @property
    def num_features(self) -> int:
        return self.encoder.num_features

    def encode(self, image: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, S, S), uint8 or floating point in [-1, 1] -> memory (B, M, E)."""
        return self.encoder(image)

    def token_loss(self, logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Cross-entropy (B, L) float32 of logits (B, L, V) for true tokens (B, L), with `model.label_smoothing`."""
        loss = F.cross_entropy(
            logits.float().flatten(0, 1),
            tokens.flatten(),
            reduction="none",
            label_smoothing=self.config.label_smoothing,
        )
        return loss.view(tokens.shape)

    def activation_bytes(self, number_bytes: int) -> float:
        return encoder_decoder_activations(
            self.encoder.activation_bytes(number_bytes),
            (self.encoder.num_patches, self.encoder.num_features),
            self.config,
            vocab_size=self.vocab_size,
            length=self.length,
            b=number_bytes,
        )

    def randomize_head_(self) -> None:
        # The head is initialized to 0, so every token would be code 0.
        nn.init.normal_(self.head.weight, generator=torch.Generator().manual_seed(0))
