"""Cached autoregressive decoding of tokens, without host synchronization inside the loop.

The tokens of an image do not depend on the other images of its batch.

B batch, S image side, M memory tokens, E encoder width, L code length, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import nn

from uvim_fsq.compilation import compiled, require_compiler
from uvim_fsq.lm.base import Generated
from uvim_fsq.lm.bf16_weights import with_bf16_weights
from uvim_fsq.lm.kv_cache import DecoderCache
from uvim_fsq.lm.sampling import GREEDY, Sampling, example_uniforms, sample

#: A step reads the cache up to the next multiple of this. Each multiple needs its own graph, which is slow to compile.
CACHE_BLOCK, COMPILED_CACHE_BLOCK = 64, 128


#: A batch may be padded to at most this many times its size to reuse the buffers and graphs of an earlier batch.
MAX_PADDING = 4


class CachedDecoder(Protocol):
    """The part of `AutoregressiveLM` that step-by-step generation uses."""

    length: int
    vocab_size: int
    blocks: nn.ModuleList
    head: nn.Linear

    def encode(self, image: torch.Tensor) -> torch.Tensor: ...

    def decode_step(self, previous: torch.Tensor, cache: DecoderCache, span: int | None = None) -> torch.Tensor: ...

    def new_cache(self, memory: torch.Tensor, *, int8: bool = False, static: bool = True) -> DecoderCache: ...

    def refill_cache(self, cache: DecoderCache, memory: torch.Tensor) -> None: ...

    def modules(self) -> Iterator[nn.Module]: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...


@dataclass
class DecodingBuffers:
    """The buffers, and on a GPU the captured steps, for one batch size.

    Attributes:
        cache: keys and values, and the position.
        tokens: (B, L) int64, filled position by position.
        previous: (B, 1) int64, the last token.
        uniforms: (B, L) float64 in [0, 1), for sampling; unused by greedy decoding.
        probabilities: (B, L, V) float32 if requested, else None.
        graphs: captured steps by the number of cache positions that they read.
    """

    cache: DecoderCache
    tokens: torch.Tensor
    previous: torch.Tensor
    uniforms: torch.Tensor
    probabilities: torch.Tensor | None = None
    graphs: dict[int, Any] = field(default_factory=dict)

    def reset(self) -> None:
        """Goes back to the first position."""
        assert isinstance(self.cache.position, torch.Tensor)
        self.cache.position.zero_()

    @classmethod
    def create(cls, model: CachedDecoder, memory: torch.Tensor, *, int8: bool, probabilities: bool) -> DecodingBuffers:
        """Allocates buffers for `memory` (B, M, E)."""
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
    """The buffers of a few batch sizes, which together take less than 4/3 of the memory of the largest.

    Args:
        compiled: whether steps are compiled. If so, any amount of padding costs less than compiling a new batch size.
    """

    def __init__(self, compiled: bool) -> None:
        self.compiled = compiled
        self.by_size: dict[int, DecodingBuffers] = {}

    def batch_size(self, batch: int, device: torch.device) -> int:
        """The size that a batch is decoded at: its own or, on a GPU, the larger size of an earlier batch.

        Frees the buffers that a new size replaces.
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
    """Decodes batches of images with one LM.

    On a GPU it keeps static buffers for each batch size and captured steps; compiled steps need the buffers as well.
    Otherwise each batch gets a cache of its own.

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
        # Functions instead of bound methods: a reference cycle would keep the buffers alive until garbage collection.
        self._next = compiled(TokenGenerator._next_tokens, fullgraph=True) if compile else TokenGenerator._next_tokens
        self.compiled, self.span = compile, COMPILED_CACHE_BLOCK if compile else CACHE_BLOCK
        self._pool = BufferPool(compile)
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
        batch = copies * len(images)
        drawn = self.draw(torch.arange(batch) if seeds is None else seeds)
        if not self._is_static(images.device):
            return self.predict(images, drawn, copies)
        size = self._pool.batch_size(batch, images.device)
        # A captured step has a fixed batch size, so a smaller batch is padded with its last image.
        if copies == 1 and size > batch:
            images = torch.cat([images, images[-1:].expand(size - batch, -1, -1, -1)])
        with self._decoding_context(images.device):
            memory = self.model.encode(images)
            if copies > 1:
                memory = torch.cat([*[memory] * copies, memory[-1:].expand(size - batch, -1, -1)])
            buffers = self._prepare_buffers(memory)
            if drawn is not None:
                buffers.uniforms[:batch].copy_(drawn, non_blocking=True)
            for position in range(self.model.length):
                span = min((position // self.span + 1) * self.span, self.model.length)
                if span in buffers.graphs:
                    buffers.graphs[span].replay()
                else:
                    self._step(buffers, span)
        probabilities = None if buffers.probabilities is None else buffers.probabilities[:batch].clone()
        return Generated(buffers.tokens[:batch].clone(), probabilities, memory[:batch])

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
            cache = self.model.new_cache(memory, int8=self.int8, static=False)
            previous = memory.new_zeros(memory.shape[0], 1, dtype=torch.long)
            for position in range(self.model.length):
                cache.position = position
                logits = self.model.decode_step(previous, cache).float()
                previous, probability = self._choose(logits, None if drawn is None else drawn[:, position, None])
                tokens.append(previous)
                probabilities.append(probability)
        kept = torch.cat([p for p in probabilities if p is not None], 1) if self.probabilities else None
        return Generated(torch.cat(tokens, 1), kept, memory)

    def _predict_in_loop(self, memory: torch.Tensor, drawn: torch.Tensor | None) -> Generated:
        """`predict` from the encoded images on, while a graph is exported, which then holds a loop."""
        from torch._higher_order_ops.while_loop import while_loop  # imports torch's compiler

        start = self.model.new_cache(memory, int8=self.int8)
        batch, length, device = memory.shape[0], self.model.length, memory.device
        uniforms = memory.new_zeros(0) if drawn is None else drawn

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
            found = self._next_tokens(previous, DecoderCache(layers, position), uniforms, length)
            kept = tuple(x.index_copy(1, position, y) for x, y in zip(kept, found, strict=False) if y is not None)
            return position + 1, found[0].clone(), tuple(layer.own for layer in layers), kept

        first = torch.zeros(1, dtype=torch.long, device=device)
        tokens = torch.zeros(batch, length, dtype=torch.long, device=device)
        sizes = (batch, length, self.model.vocab_size)
        kept = (tokens, torch.zeros(sizes, device=device)) if self.probabilities else (tokens,)
        own = tuple(layer.own for layer in start.layers)
        *_, found = while_loop(unfinished, step, (first, torch.zeros_like(tokens[:, :1]), own, kept))
        return Generated(found[0], found[1] if self.probabilities else None, memory)

    def _is_static(self, device: torch.device) -> bool:
        """Whether to decode with static buffers, which captured and compiled steps need."""
        return self.compiled or device.type == "cuda"

    @contextlib.contextmanager
    def _decoding_context(self, device: torch.device) -> Iterator[None]:
        """Autocast, with streams and graphs on the GPU of the images, which need not be the current one."""
        on_device = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
        # No cache of casts: it would become part of the graph, and the weights are in bf16 already.
        bf16 = self.precision == "bf16"
        with on_device, torch.autocast(device.type, torch.bfloat16, enabled=bf16, cache_enabled=False):
            yield

    def _prepare_buffers(self, memory: torch.Tensor) -> DecodingBuffers:
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
        # Warm up first: lazy initialization and compilation are not allowed while a graph is being captured.
        warmup = torch.cuda.Stream()
        warmup.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warmup):
            for _ in range(2):
                self._step(buffers, span)
                buffers.reset()
        torch.cuda.current_stream().wait_stream(warmup)
        graph = buffers.graphs[span] = torch.cuda.CUDAGraph()
        # Thread-local, because the loader's thread may pin memory during the capture.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._step(buffers, span)
        buffers.reset()

    def _step(self, buffers: DecodingBuffers, span: int) -> None:
        """Chooses and stores the next token of every image, and advances the position."""
        position = buffers.cache.position
        assert isinstance(position, torch.Tensor)
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
        assert isinstance(cache.position, torch.Tensor)
        drawn = uniforms.index_select(1, cache.position) if self.sampling.temperature > 0 else None
        return self._choose(logits, drawn)

    def _choose(self, logits: torch.Tensor, drawn: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The next tokens (B, 1) for logits (B, V) and random numbers (B, 1), and if requested, their distributions."""
        probabilities = logits.softmax(-1).unsqueeze(1) if self.probabilities else None
        if drawn is None:
            return logits.argmax(-1, keepdim=True), probabilities
        chosen = sample(logits / self.sampling.temperature, drawn, self.sampling.top_k, self.sampling.top_p)
        return chosen, probabilities
