"""Cached autoregressive decoding of tokens, without host synchronization inside the loop.

The tokens of an image do not depend on the other images of its batch.

B batch, S image side, M memory tokens, E encoder width, L code length, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Protocol

import torch
from torch import nn

from uvim_fsq.compilation import compiled, require_compiler
from uvim_fsq.lm.base import Generated
from uvim_fsq.lm.bf16_weights import with_bf16_weights
from uvim_fsq.lm.captured import CapturedBatches, generate
from uvim_fsq.lm.kv_cache import DecoderCache
from uvim_fsq.lm.sampling import GREEDY, Sampling, example_uniforms, sample

#: A compiled step reads the cache up to the next multiple of this. Each multiple is compiled, which takes long.
COMPILED_CACHE_BLOCK = 128


class CachedDecoder(Protocol):
    """The part of `AutoregressiveLM` that step-by-step generation uses."""

    length: int
    vocab_size: int
    blocks: nn.ModuleList
    head: nn.Linear

    def encode(self, image: torch.Tensor) -> torch.Tensor: ...

    def decode_step(self, previous: torch.Tensor, cache: DecoderCache, span: int | None = None) -> torch.Tensor: ...

    def new_cache(self, memory: torch.Tensor, *, int8: bool = False, static: bool = True) -> DecoderCache: ...

    def modules(self) -> Iterator[nn.Module]: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...


class TokenGenerator:
    """Decodes batches of images with one LM.

    On a GPU, all of it is one captured graph for each batch size, image encoder included.

    With `precision="bf16"` the weights are copied at construction, so later changes to the model have no effect.

    Args:
        model: in evaluation mode.
        sampling: how tokens are chosen.
        precision: "fp32" or "bf16", for matrix products and the cache; norms, residuals and logits stay in float32.
        int8: store cross-attention keys and values in 8 bits. They are most of what a step reads from memory. Tokens
            may change.
        compile: torch.compile the step. At full size the first call takes minutes for each batch size.
        probabilities: also return the distribution of each token.

    Raises UserError if `int8` is set for a model on a GPU and there is no working compiler.
    """

    def __init__(
        self,
        model: CachedDecoder,
        sampling: Sampling = GREEDY,
        *,
        precision: str = "fp32",
        int8: bool = False,
        compile: bool = False,
        probabilities: bool = False,
    ) -> None:
        if int8 and next(model.parameters()).is_cuda:
            require_compiler()
        self.sampling, self.int8, self.precision, self.probabilities = sampling, int8, precision, probabilities
        self.model = with_bf16_weights(model) if precision == "bf16" else model
        # Functions instead of bound methods: a reference cycle would keep the graphs alive until garbage collection.
        self._next = compiled(TokenGenerator._next_tokens, fullgraph=True) if compile else TokenGenerator._next_tokens
        self.compiled = compile
        self.graphs = CapturedBatches(any_padding=compile)
        #: Whether `predict` becomes one step and a loop, which is possible only while a graph is exported.
        self.in_loop = False

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor, seeds: torch.Tensor | None = None) -> Generated:
        """Generates tokens.

        Args:
            images: (B, 3, S, S), uint8 or floating point in [-1, 1].
            seeds: (B,) int64, one random stream per image; 0 to B - 1 by default. Unused by greedy decoding.
        """
        return self.samples(images, seeds, 1)

    @torch.inference_mode()
    def samples(self, images: torch.Tensor, seeds: torch.Tensor | None, copies: int) -> Generated:
        """Generates several samples of each image, see `SampleGenerator`."""
        return generate(self, self.graphs, images, seeds, copies)

    def draw(self, seeds: torch.Tensor) -> torch.Tensor | None:
        """Random numbers (B, L) float64 in [0, 1) for images with seeds (B,) int64, or None for greedy decoding."""
        return example_uniforms(seeds, self.model.length) if self.sampling.temperature > 0 else None

    def predict(self, images: torch.Tensor, drawn: torch.Tensor | None, copies: int = 1) -> Generated:
        """Generates tokens without buffers, one step after the other, so that all of it can be one graph.

        The graph holds every step, or with `in_loop` one step and a loop.

        Args:
            images: (B, 3, S, S).
            drawn: (copies * B, L), from `draw`.
            copies: how many samples of each image; B in the result counts all samples, those of one draw together.
        """
        tokens: list[torch.Tensor] = []
        probabilities: list[torch.Tensor | None] = []
        with self._decoding_context(images.device):
            memory = self.model.encode(images)
            memory = memory if copies == 1 else memory.repeat(copies, 1, 1)
            if self.in_loop:
                return self._predict_in_loop(memory, drawn)
            # The position is a tensor if one compiled step serves all positions; else a step reads and computes less.
            static = self.compiled and not torch.compiler.is_exporting()
            cache = self.model.new_cache(memory, int8=self.int8, static=static)
            previous = memory.new_zeros(memory.shape[0], 1, dtype=torch.long)
            for position in range(self.model.length):
                previous, probability = self._step(previous, cache, drawn, position)
                tokens.append(previous)
                probabilities.append(probability)
        kept = torch.cat([p for p in probabilities if p is not None], 1) if self.probabilities else None
        return Generated(torch.cat(tokens, 1), kept, memory)

    def _predict_in_loop(self, memory: torch.Tensor, drawn: torch.Tensor | None) -> Generated:
        """`predict` from the encoded images on, while a graph is exported, which then holds a loop."""
        from torch._higher_order_ops.while_loop import while_loop  # imports torch's compiler

        start = self.model.new_cache(memory, int8=self.int8)
        batch, length, device = memory.shape[0], self.model.length, memory.device

        def unfinished(position: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
            return (position < length).all()

        # What the loop carries: the position, the last token, keys and values of each block, and what it returns. The
        # body copies what it changes, because it must not write to what it is given.
        def step(
            position: torch.Tensor,
            previous: torch.Tensor,
            own: tuple[torch.Tensor, ...],
            kept: tuple[torch.Tensor, ...],
        ) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
            layers = [replace(layer, own=x.clone()) for layer, x in zip(start.layers, own, strict=True)]
            found = self._next_tokens(previous, DecoderCache(layers, position), drawn, length)
            kept = tuple(x.index_copy(1, position, y) for x, y in zip(kept, found, strict=False) if y is not None)
            return position + 1, found[0].clone(), tuple(layer.own for layer in layers), kept

        first = torch.zeros(1, dtype=torch.long, device=device)
        tokens = torch.zeros(batch, length, dtype=torch.long, device=device)
        sizes = (batch, length, self.model.vocab_size)
        kept = (tokens, torch.zeros(sizes, device=device)) if self.probabilities else (tokens,)
        own = tuple(layer.own for layer in start.layers)
        *_, found = while_loop(unfinished, step, (first, torch.zeros_like(tokens[:, :1]), own, kept))
        return Generated(found[0], found[1] if self.probabilities else None, memory)

    def _decoding_context(self, device: torch.device) -> torch.autocast:
        # No cache of casts: it would become part of the graph, and the weights are in bf16 already.
        return torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bf16", cache_enabled=False)

    def _step(
        self, previous: torch.Tensor, cache: DecoderCache, drawn: torch.Tensor | None, position: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The tokens (B, 1) at a position, and if requested, their distributions."""
        if isinstance(cache.position, int):
            cache.position = position
            logits = self.model.decode_step(previous, cache).float()
            return self._choose(logits, None if drawn is None else drawn[:, position, None])
        block = COMPILED_CACHE_BLOCK
        span = min((position // block + 1) * block, self.model.length)
        found = self._next(self, previous, cache, drawn, span)
        cache.position += 1
        return found

    def _next_tokens(
        self, previous: torch.Tensor, cache: DecoderCache, uniforms: torch.Tensor | None, span: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        logits = self.model.decode_step(previous, cache, span).float()
        assert isinstance(cache.position, torch.Tensor)
        return self._choose(logits, None if uniforms is None else uniforms.index_select(1, cache.position))

    def _choose(self, logits: torch.Tensor, drawn: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The next tokens (B, 1) for logits (B, V) and random numbers (B, 1), and if requested, their distributions."""
        probabilities = logits.softmax(-1).unsqueeze(1) if self.probabilities else None
        if drawn is None:
            return logits.argmax(-1, keepdim=True), probabilities
        chosen = sample(logits / self.sampling.temperature, drawn, self.sampling.top_k, self.sampling.top_p)
        return chosen, probabilities
