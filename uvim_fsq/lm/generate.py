"""Decoding: image -> tokens, one position at a time with a cache. No host synchronisation inside the loop. Results do
not depend on the batch an image was decoded in.

B batch, L code length, V vocabulary.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from uvim_fsq.compilation import compiled, require_compiler
from uvim_fsq.errors import UserError
from uvim_fsq.lm.cache import DecoderCache
from uvim_fsq.lm.model import LM


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen from its logits.

    Attributes:
        temperature: 0 takes the argmax; above 0 samples.
        top_k: sample among the k likeliest tokens. Not together with top_p.
        top_p: sample among the fewest likeliest tokens that hold this much probability.

    Raises UserError for impossible settings.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise UserError(f"temperature={self.temperature} is negative; 0 is greedy")
        if self.top_k is not None and self.top_p is not None:
            raise UserError("top_k and top_p exclude each other; give one of them")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k={self.top_k}: keep at least one token")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p}: must be above 0 and at most 1")


GREEDY = Sampling()
#: A step reads the cache up to the next multiple of this. Each one is a graph of its own, which takes long to compile.
SPAN, COMPILED_SPAN = 64, 128
#: The buffers and graphs of a batch size serve batches down to this part of it.
SERVES = 4


@dataclass
class _Buffers:
    """What decoding a batch of one size needs; on a GPU with the captured steps."""

    cache: DecoderCache
    tokens: torch.Tensor
    previous: torch.Tensor
    uniforms: torch.Tensor
    graphs: dict[int, Any] = field(default_factory=dict)
    """By the number of positions that a step reads."""


class Decoder:
    """Decodes batches of images with one LM; keeps static buffers, and on a GPU a captured step, for each batch size.

    The LM's weights are taken as they are when the decoder is made if `precision` is bf16, else as they are when used.

    Args:
        model: in evaluation mode.
        sampling: how tokens are chosen.
        precision: "fp32" or "bf16", of products and cache; norms, residuals and logits stay float32.
        int8: cross-attention keys and values in 8 bits. They are most of what a step reads from memory; the tokens may
            change.
        compile: torch.compile the step (at full size the first use takes minutes for each batch size).
    """

    def __init__(
        self,
        model: LM,
        sampling: Sampling = GREEDY,
        *,
        precision: str = "fp32",
        int8: bool = False,
        compile: bool = False,
    ) -> None:
        if int8 and next(model.parameters()).is_cuda:
            require_compiler()
        self.sampling, self.int8, self.precision = sampling, int8, precision
        self.model = _with_bf16_weights(model) if precision == "bf16" else model
        # Functions, not bound methods: a decoder that held itself would keep its buffers until Python looks for cycles.
        self._next = compiled(Decoder._next_tokens, fullgraph=True) if compile else Decoder._next_tokens
        self.compiled, self.span = compile, COMPILED_SPAN if compile else SPAN
        self._buffers: dict[int, _Buffers] = {}

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor, seeds: torch.Tensor | None = None) -> torch.Tensor:
        """(B, 3, S, S) images, uint8 or floating in [-1, 1] -> tokens (B, L) int64 in [0, V).

        `seeds`: (B,) int64, one stream of random numbers per example; default 0..B-1. Unused when greedy.
        """
        batch = len(images)
        size = self._size(batch, images.device)
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
        return buffers.tokens[:batch].clone()

    def _size(self, batch: int, device: torch.device) -> int:
        """How many images are decoded together for a batch: on a GPU as many as an earlier batch had, if not too many.

        Drops the buffers that a new size replaces, so that all together stay below 4/3 of the largest.
        """
        if batch in self._buffers:
            return batch
        # Where a step is compiled, a larger batch costs less than a new size.
        fits = [size for size in self._buffers if batch < size and (self.compiled or size <= SERVES * batch)]
        if fits and device.type == "cuda":
            return min(fits)
        for size in list(self._buffers):
            if max(size, batch) <= SERVES * min(size, batch):
                del self._buffers[size]
        return batch

    @contextlib.contextmanager
    def _on(self, device: torch.device) -> Iterator[None]:
        """The decoder's arithmetic, and streams and graphs on the images' GPU, which need not be the current one."""
        place = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
        # Weights are bf16 already; autocast's cache of casts would end up inside the graph.
        bf16 = self.precision == "bf16"
        with place, torch.autocast(device.type, torch.bfloat16, enabled=bf16, cache_enabled=False):
            yield

    def _ready(self, memory: torch.Tensor) -> _Buffers:
        batch, device = len(memory), memory.device
        if batch in self._buffers:
            buffers = self._buffers[batch]
            self.model.refill_cache(buffers.cache, memory)
            return buffers
        shape = (batch, self.model.length)
        tokens = torch.zeros(shape, dtype=torch.long, device=device)
        cache = self.model.new_cache(memory, int8=self.int8)
        uniforms = torch.zeros(shape, dtype=torch.float64, device=device)
        buffers = _Buffers(cache, tokens, torch.zeros_like(tokens[:, :1]), uniforms)
        if device.type == "cuda":
            length = self.model.length
            for span in {min(end, length) for end in range(self.span, length + self.span, self.span)}:
                self._capture(buffers, span)
        self._buffers[batch] = buffers
        return buffers

    def _capture(self, buffers: _Buffers, span: int) -> None:
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

    def _step(self, buffers: _Buffers, span: int) -> None:
        """Chooses the next token of every image, writes it down and moves on by one."""
        position = buffers.cache.position
        chosen = self._next(self, buffers.previous, buffers.cache, buffers.uniforms, span)
        buffers.tokens.index_copy_(1, position, chosen)
        buffers.previous.copy_(chosen)
        position += 1

    def _next_tokens(
        self, previous: torch.Tensor, cache: DecoderCache, uniforms: torch.Tensor, span: int
    ) -> torch.Tensor:
        logits = self.model.decode_step(previous, cache, span).float()
        if self.sampling.temperature == 0:
            return logits.argmax(-1, keepdim=True)
        drawn = uniforms.index_select(1, cache.position)
        return sample(logits / self.sampling.temperature, drawn, self.sampling.top_k, self.sampling.top_p)


def _with_bf16_weights(model: LM) -> LM:
    """A copy whose matrices are bf16; embeddings, norms, the image's normalisation and the head stay float32."""
    model = copy.deepcopy(model)
    for part in model.modules():
        if isinstance(part, (nn.Linear, nn.Conv2d)) and part is not model.head:
            part.to(torch.bfloat16)
    return model


def generate(
    model: LM,
    images: torch.Tensor,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seeds: torch.Tensor | None = None,
) -> torch.Tensor:
    """Predicts the tokens of `images` (B, 3, S, S) -> (B, L) int64 in [0, V), once; see Decoder and Sampling."""
    return Decoder(model, Sampling(temperature, top_k, top_p))(images, seeds)


def example_uniforms(seeds: torch.Tensor, length: int) -> torch.Tensor:
    """(B,) int64 seeds -> (B, L) float64 in [0, 1), each row drawn from its own generator, whatever the batch."""
    rows = [
        torch.rand(length, generator=torch.Generator().manual_seed(int(seed)), dtype=torch.float64) for seed in seeds
    ]
    return torch.stack(rows)


def sample(logits: torch.Tensor, uniform: torch.Tensor, top_k: int | None, top_p: float | None) -> torch.Tensor:
    """Inverse-CDF draw from float32 logits (B, V) with uniforms (B, 1) float64 -> (B, 1) int64.

    The CDF runs in the vocabulary's order, not in that of the probabilities: rounding could swap two nearly equal ones.
    A token of probability 0, or one that a filter cut, is never chosen.
    """
    probabilities = logits.double().softmax(1)
    if top_k is not None:
        smallest = probabilities.topk(min(top_k, probabilities.shape[1]), dim=1).values[:, -1:]
        probabilities = probabilities * (probabilities >= smallest)
    if top_p is not None:
        ordered = probabilities.sort(dim=1, descending=True).values
        # A token stays if those before it hold less than top_p; the likeliest always stays.
        smallest = ordered.masked_fill(ordered.cumsum(1) - ordered >= top_p, 1.0).amin(1, keepdim=True)
        probabilities = probabilities * (probabilities >= smallest)
    cumulative = probabilities.cumsum(1)
    return (cumulative <= uniform * cumulative[:, -1:]).sum(1, keepdim=True)
