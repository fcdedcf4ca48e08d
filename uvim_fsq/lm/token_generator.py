"""Decoding: image -> tokens, one position at a time with a cache. No host synchronization inside the loop. Results do
not depend on the batch an image was decoded in.

B batch, L code length, V vocabulary.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from uvim_fsq.compilation import compiled, require_compiler
from uvim_fsq.lm.base import Generated
from uvim_fsq.lm.kv_cache import DecoderCache
from uvim_fsq.lm.sampling import GREEDY, Sampling, example_uniforms, sample

#: A step reads the cache up to the next multiple of this. Each one is a graph of its own, which takes long to compile.
CACHE_BLOCK, COMPILED_CACHE_BLOCK = 64, 128


#: A batch may be padded to at most this many times its size, to use the buffers and graphs of an earlier batch.
MAX_PADDING = 4


class CachedDecoder(Protocol):
    """What step-by-step generation needs of a token model: `uvim_fsq.lm.autoregressive.AutoregressiveLM`."""

    length: int
    vocab_size: int
    head: nn.Linear

    def encode(self, image: torch.Tensor) -> torch.Tensor: ...

    def decode_step(self, previous: torch.Tensor, cache: DecoderCache, span: int | None = None) -> torch.Tensor: ...

    def new_cache(self, memory: torch.Tensor, *, int8: bool = False) -> DecoderCache: ...

    def refill_cache(self, cache: DecoderCache, memory: torch.Tensor) -> None: ...

    def modules(self) -> Iterator[nn.Module]: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...


@dataclass
class DecodingBuffers:
    """What generating the tokens of one batch size needs; on a GPU with the captured steps.

    Attributes:
        cache: keys and values, and the position.
        tokens: (B, L) int64, filled position by position.
        previous: (B, 1) int64, the last token.
        uniforms: (B, L) float64 random numbers; unused when greedy.
        probabilities: (B, L, V) float32 where they are asked for.
        graphs: captured steps, by the number of positions that a step reads.
    """

    cache: DecoderCache
    tokens: torch.Tensor
    previous: torch.Tensor
    uniforms: torch.Tensor
    probabilities: torch.Tensor | None = None
    graphs: dict[int, Any] = field(default_factory=dict)

    @classmethod
    def create(cls, model: CachedDecoder, memory: torch.Tensor, *, int8: bool, probabilities: bool) -> DecodingBuffers:
        """Buffers for `memory` (B, M, E)."""
        shape, device = (len(memory), model.length), memory.device
        tokens = torch.zeros(shape, dtype=torch.long, device=device)
        return cls(
            cache=model.new_cache(memory, int8=int8),
            tokens=tokens,
            previous=torch.zeros_like(tokens[:, :1]),
            uniforms=torch.zeros(shape, dtype=torch.float64, device=device),
            probabilities=torch.zeros(*shape, model.vocab_size, device=device) if probabilities else None,
        )


class BufferPool:
    """The buffers of a few batch sizes, all together below 4/3 of the largest.

    `compiled`: whether steps are compiled; then a larger batch costs less than a new size.
    """

    def __init__(self, compiled: bool) -> None:
        self.compiled = compiled
        self.by_size: dict[int, DecodingBuffers] = {}

    def batch_size(self, batch: int, device: torch.device) -> int:
        """How many images are decoded together for a batch: on a GPU as many as an earlier batch had, if not too many.

        Drops the buffers that a new size replaces.
        """
        if batch in self.by_size:
            return batch
        fits = [size for size in self.by_size if batch < size and (self.compiled or size <= MAX_PADDING * batch)]
        if fits and device.type == "cuda":
            return min(fits)
        for size in list(self.by_size):
            if max(size, batch) <= MAX_PADDING * min(size, batch):
                del self.by_size[size]
        return batch


class TokenGenerator:
    """Decodes batches of images with one LM; keeps static buffers, and on a GPU a captured step, for each batch size.

    The LM's weights are taken as they are when the decoder is made if `precision` is bf16, else as they are when used.

    Args:
        model: in evaluation mode.
        sampling: how tokens are chosen.
        precision: "fp32" or "bf16", of products and cache; norms, residuals and logits stay float32.
        int8: cross-attention keys and values in 8 bits. They are most of what a step reads from memory; the tokens may
            change.
        compile: torch.compile the step (at full size the first use takes minutes for each batch size).
        probabilities: also return the distribution of each token.
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
        self.model = _with_bf16_weights(model) if precision == "bf16" else model
        # Functions, not bound methods: a decoder that held itself would keep its buffers until Python looks for cycles.
        self._next = compiled(TokenGenerator._next_tokens, fullgraph=True) if compile else TokenGenerator._next_tokens
        self.compiled, self.span = compile, COMPILED_CACHE_BLOCK if compile else CACHE_BLOCK
        self._pool = BufferPool(compile)

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor, seeds: torch.Tensor | None = None) -> Generated:
        """(B, 3, S, S) images, uint8 or floating in [-1, 1] -> tokens (B, L) int64 in [0, V).

        `seeds`: (B,) int64, one stream of random numbers per example; default 0..B-1. Unused when greedy.
        """
        batch = len(images)
        size = self._pool.batch_size(batch, images.device)
        if size > batch:
            # A captured step has one batch size: a smaller batch repeats its last image.
            images = torch.cat([images, images[-1:].expand(size - batch, -1, -1, -1)])
        with self._on(images.device):
            buffers = self._ready(self.model.encode(images))
            if self.sampling.temperature > 0:
                seeds = torch.arange(batch) if seeds is None else seeds
                uniforms = example_uniforms(seeds, self.model.length)
                buffers.uniforms[:batch].copy_(uniforms, non_blocking=True)
            for position in range(self.model.length):
                span = min((position // self.span + 1) * self.span, self.model.length)
                if span in buffers.graphs:
                    buffers.graphs[span].replay()
                else:
                    self._step(buffers, span)
        probabilities = None if buffers.probabilities is None else buffers.probabilities[:batch].clone()
        return Generated(buffers.tokens[:batch].clone(), probabilities)

    @contextlib.contextmanager
    def _on(self, device: torch.device) -> Iterator[None]:
        """The decoder's arithmetic, and streams and graphs on the images' GPU, which need not be the current one."""
        place = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
        # Weights are bf16 already; autocast's cache of casts would end up inside the graph.
        bf16 = self.precision == "bf16"
        with place, torch.autocast(device.type, torch.bfloat16, enabled=bf16, cache_enabled=False):
            yield

    def _ready(self, memory: torch.Tensor) -> DecodingBuffers:
        batch, device = len(memory), memory.device
        if batch in self._pool.by_size:
            buffers = self._pool.by_size[batch]
            self.model.refill_cache(buffers.cache, memory)
            return buffers
        buffers = DecodingBuffers.create(self.model, memory, int8=self.int8, probabilities=self.probabilities)
        if device.type == "cuda":
            length = self.model.length
            for span in {min(end, length) for end in range(self.span, length + self.span, self.span)}:
                self._capture(buffers, span)
        self._pool.by_size[batch] = buffers
        return buffers

    def _capture(self, buffers: DecodingBuffers, span: int) -> None:
        # Lazy initialisation of libraries, and compilation, may not happen while a graph is captured.
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(2):
                self._step(buffers, span)
                buffers.cache.position.zero_()
        torch.cuda.current_stream().wait_stream(aside)
        graph = buffers.graphs[span] = torch.cuda.CUDAGraph()
        # Other threads may go on meanwhile: the loader's pins memory.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._step(buffers, span)
        buffers.cache.position.zero_()

    def _step(self, buffers: DecodingBuffers, span: int) -> None:
        """Chooses the next token of every image, writes it down and moves on by one."""
        position = buffers.cache.position
        chosen, probabilities = self._next(self, buffers.previous, buffers.cache, buffers.uniforms, span)
        buffers.tokens.index_copy_(1, position, chosen)
        if buffers.probabilities is not None and probabilities is not None:
            buffers.probabilities.index_copy_(1, position, probabilities)
        buffers.previous.copy_(chosen)
        position += 1

    def _next_tokens(
        self, previous: torch.Tensor, cache: DecoderCache, uniforms: torch.Tensor, span: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        logits = self.model.decode_step(previous, cache, span).float()
        probabilities = logits.softmax(-1).unsqueeze(1) if self.probabilities else None
        if self.sampling.temperature == 0:
            return logits.argmax(-1, keepdim=True), probabilities
        drawn = uniforms.index_select(1, cache.position)
        chosen = sample(logits / self.sampling.temperature, drawn, self.sampling.top_k, self.sampling.top_p)
        return chosen, probabilities


def _with_bf16_weights(model: CachedDecoder) -> CachedDecoder:
    """A copy whose matrices are bf16; embeddings, norms, the image's normalisation and the head stay float32."""
    model = copy.deepcopy(model)
    for part in model.modules():
        if isinstance(part, (nn.Linear, nn.Conv2d)) and part is not model.head:
            part.to(torch.bfloat16)
    return model
