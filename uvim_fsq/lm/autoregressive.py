"""The language model (UViM, stage II), an encoder-decoder that predicts an image's tokens one at a time.

The image encoder turns the image into M memory tokens, which the decoder attends to. The model is independent of tasks
and labels.

B batch, S image side, M memory tokens (patches), E encoder width, L code length, V vocabulary, D decoder width,
H heads, hd head size.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from uvim_fsq.config.schema import LMModelConfig
from uvim_fsq.lm.base import CodeLoss, Generated, Generator, register_token_model, total_loss
from uvim_fsq.lm.decoder_block import DecoderBlock
from uvim_fsq.lm.encoder_decoder import EncoderDecoder
from uvim_fsq.lm.kv_cache import DecoderCache, LayerCache
from uvim_fsq.lm.sampling import GREEDY, Sampling
from uvim_fsq.lm.token_generator import TokenGenerator
from uvim_fsq.performance.flops import AutoregressiveCost, autoregressive_cost


@register_token_model("autoregressive")
class AutoregressiveLM(EncoderDecoder):
    """An encoder-decoder transformer with a causal decoder, whose first input is the learned vector `start`."""

    has_cached_decoding = True
    start: nn.Parameter

    def __init__(self, config: LMModelConfig, *, image_size: int, vocab_size: int, length: int) -> None:
        super().__init__(
            config, image_size=image_size, vocab_size=vocab_size, length=length, causal=True, symbol="start"
        )

    def decode(self, tokens: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        """Teacher-forced logits of all positions: targets (B, L) int64, shifted right inside -> (B, L, V)."""
        embedded = self.token_embedding(tokens)
        start = self.start.to(embedded.dtype).expand(len(tokens), -1, -1)
        x = torch.cat([start, embedded[:, :-1]], dim=1) + self.positions[:, : tokens.shape[1]]
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x, memory)
        return self.head(self.norm(x))

    def decode_step(self, previous: torch.Tensor, cache: DecoderCache, span: int | None = None) -> torch.Tensor:
        """Logits (B, V) of the token at `cache.position`.

        The logits have the dtype of the weights, even inside autocast, because in bf16 the two largest are often equal.
        The step fills the cache at its position; the caller advances the position. If the position is a tensor,
        everything that depends on it is a tensor operation, so that one compiled step serves all positions.

        Args:
            previous: (B, 1) int64, the previous token; ignored at position 0.
            cache: from `new_cache`.
            span: how many positions of the buffers to read (default: all). The current position must be among them.
                Only for positions that are tensors; otherwise a step reads exactly those that are filled.
        """
        position = cache.position
        if isinstance(position, int):
            span, mask = position + 1, None
            x = self.start[0].expand(previous.shape[0], -1) if position == 0 else self.token_embedding(previous[:, 0])
            x = x + self.positions[0, position]
        else:
            span = span or self.length
            embedded = self.token_embedding(previous[:, 0])
            x = torch.where(position == 0, self.start[0].to(embedded.dtype), embedded)
            x = x + self.positions[0].index_select(0, position)
            later = torch.arange(span, device=position.device) > position
            # An additive mask, because every attention call would convert a boolean one again.
            mask = torch.zeros_like(later, dtype=cache.layers[0].own.dtype).masked_fill(later, -torch.inf)[None]
        for block, layer in zip(self.blocks, cache.layers, strict=True):
            assert isinstance(block, DecoderBlock)
            x = block.step(x, layer, position, span, mask)
        with torch.autocast(x.device.type, enabled=False):
            return self.head(self.norm(x))

    def _step_constants(self, memory: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Per block, the tensors that all steps share: the merged projection, cross-attention keys and values."""
        for block in self.blocks:
            assert isinstance(block, DecoderBlock)
            own = block.self_attn
            projection = torch.cat([part.weight.t() for part in (own.query, own.key, own.value)], 1)
            yield projection, *block.memory_heads(memory)

    def new_cache(self, memory: torch.Tensor, *, int8: bool = False, static: bool = True) -> DecoderCache:
        """Creates the cache for `memory` (B, M, E), and computes its cross-attention keys and values.

        Args:
            memory: the encoded images.
            int8: store keys and values in 8 bits, which nearly halves the bytes that a decoding step reads.
            static: keep the position in a tensor.
        """
        layers = [LayerCache.create(*constants, self.length, int8=int8) for constants in self._step_constants(memory)]
        return DecoderCache(layers, torch.zeros(1, dtype=torch.long, device=memory.device) if static else 0)

    def logits(self, image: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Teacher-forced logits (B, L, V) for images (B, 3, S, S) and targets (B, L) int64."""
        return self.decode(tokens, self.encode(image))

    def loss(
        self, image: torch.Tensor, tokens: torch.Tensor, code_loss: CodeLoss | None = None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Cross-entropy, averaged over the tokens of each example; logs the accuracy of the most likely token.

        The probabilities that `code_loss` receives are teacher-forced: each depends on the true earlier tokens.
        """
        memory = self.encode(image)
        logits = self.decode(tokens, memory)
        loss = self.token_loss(logits, tokens)
        logs = {"token_accuracy": (logits.argmax(-1) == tokens).float().mean(1)}
        return total_loss(loss.mean(1), logs, code_loss, logits, memory)

    def log_prob(self, image: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        logits = self.logits(image, tokens).float()
        return -F.cross_entropy(logits.transpose(1, 2), tokens, reduction="none")

    def generate(
        self,
        image: torch.Tensor,
        sampling: Sampling = GREEDY,
        seeds: torch.Tensor | None = None,
        *,
        probabilities: bool = False,
    ) -> Generated:
        self.check_sampling(sampling)
        return TokenGenerator(self, sampling, probabilities=probabilities)(image, seeds)

    def generator(
        self,
        sampling: Sampling = GREEDY,
        *,
        precision: str = "fp32",
        int8_cross_kv: bool = False,
        compile: bool = False,
        probabilities: bool = False,
    ) -> Generator:
        """A `TokenGenerator`, which on a GPU keeps a captured graph for each batch size."""
        self.check_sampling(sampling)
        return TokenGenerator(
            self,
            sampling,
            precision=precision,
            int8=int8_cross_kv,
            compile=compile,
            probabilities=probabilities,
        )

    def cost(self, steps: int | None = None) -> AutoregressiveCost:
        return autoregressive_cost(self.encoder.cost(), self.config, vocab_size=self.vocab_size, length=self.length)
