"""Decoding of a masked token model in a few steps, in the order of confidence (MaskGIT, arXiv 2202.04200).

The tokens of an image do not depend on the other images of its batch.

B batch, S image side, M memory tokens, E encoder width, H heads, hd head size, L code length, V vocabulary, D decoder
width, T steps, n tokens that are unknown before a step.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import nn

from uvim_fsq.compilation import compiled
from uvim_fsq.lm.base import Generated
from uvim_fsq.lm.bf16_weights import with_bf16_weights
from uvim_fsq.lm.captured import CapturedBatches, generate
from uvim_fsq.lm.masked_schedules import unknown_counts
from uvim_fsq.lm.sampling import GREEDY, Sampling, example_uniforms, sample

#: Per decoder block, the keys and values (B, H, M, hd) of its cross-attention.
CrossAttended = list[tuple[torch.Tensor, torch.Tensor]]


class MaskedDecoder(Protocol):
    """The part of `MaskedLM` that generation uses."""

    length: int
    vocab_size: int
    head: nn.Linear

    def encode(self, image: torch.Tensor) -> torch.Tensor: ...

    def memory_heads(self, memory: torch.Tensor) -> CrossAttended: ...

    def hidden(self, tokens: torch.Tensor, known: torch.Tensor, attended: CrossAttended) -> torch.Tensor: ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor: ...

    def modules(self) -> Iterator[nn.Module]: ...


class MaskedGenerator:
    """Decodes batches of images with one masked model.

    Each step predicts the tokens that are still unknown, and keeps the most confident predictions: those with the
    largest probability, by default, and of equal ones the first. `unknown_counts` says how many. Tokens that were kept
    do not change any more. One step predicts all tokens in parallel.

    On a GPU, all of it is one captured graph for each batch size, image encoder included.

    `Generated.probabilities` holds for each position its distribution in the step that kept its token.

    With `precision="bf16"` the weights are copied at construction, so later changes to the model have no effect.

    Args:
        model: in evaluation mode.
        sampling: how tokens are chosen, and in how many steps. With a temperature every step draws new candidates.
        precision: "fp32" or "bf16", for matrix products; norms, residuals and logits stay in float32.
        compile: torch.compile the pass over the tokens.
        probabilities: also return the distribution of each token.
    """

    def __init__(
        self,
        model: MaskedDecoder,
        sampling: Sampling = GREEDY,
        *,
        precision: str = "fp32",
        compile: bool = False,
        probabilities: bool = False,
    ) -> None:
        self.sampling, self.precision, self.probabilities = sampling, precision, probabilities
        self.model = with_bf16_weights(model) if precision == "bf16" else model
        self._hidden = compiled(self.model.hidden, fullgraph=True) if compile else self.model.hidden
        self.graphs = CapturedBatches(any_padding=compile)
        self.counts = unknown_counts(model.length, sampling.steps or 1)

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor, seeds: torch.Tensor | None = None) -> Generated:
        """Generates tokens.

        Args:
            images: (B, 3, S, S), uint8 or floating point in [-1, 1].
            seeds: (B,) int64, one random stream per image; 0 to B - 1 by default. Unused if nothing is random.
        """
        return self.samples(images, seeds, 1)

    @torch.inference_mode()
    def samples(self, images: torch.Tensor, seeds: torch.Tensor | None, copies: int) -> Generated:
        """Generates several samples of each image, see `SampleGenerator`."""
        return generate(self, self.graphs, images, seeds, copies)

    def draw(self, seeds: torch.Tensor) -> torch.Tensor | None:
        """Random numbers for images with seeds (B,) int64, or None if nothing is random.

        (B, T, 2, L) float64 in [0, 1): per step and position one for the token, one for its order.
        """
        if not self.sampling.is_random:
            return None
        steps, length = len(self.counts), self.model.length
        return example_uniforms(seeds, 2 * steps * length).view(len(seeds), steps, 2, length)

    def predict(self, images: torch.Tensor, drawn: torch.Tensor | None, copies: int = 1) -> Generated:
        """Generates tokens; all of it can be one graph.

        Args:
            images: (B, 3, S, S).
            drawn: (copies * B, T, 2, L), from `draw`.
            copies: how many samples of each image; B in the result counts all samples, those of one draw together.
        """
        bf16 = self.precision == "bf16"
        # No cache of casts: it would become part of a captured graph.
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16, cache_enabled=False):
            memory = self.model.encode(images)
            memory = memory if copies == 1 else memory.repeat(copies, 1, 1)
            numbers = None if drawn is None else drawn.permute(1, 2, 0, 3)
            tokens, kept = self._decode(memory.shape[0], self.model.memory_heads(memory), numbers)
        return Generated(tokens, kept, memory)

    def _decode(
        self, batch: int, attended: CrossAttended, drawn: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        length, vocab, device = self.model.length, self.model.vocab_size, attended[0][0].device
        tokens = torch.zeros(batch, length, dtype=torch.long, device=device)
        known = torch.zeros_like(tokens, dtype=torch.bool)
        kept = torch.zeros(batch, length, vocab, device=device) if self.probabilities else None
        unknown = torch.arange(length, device=device).expand(batch, -1)
        for step, (count, left) in enumerate(itertools.pairwise((*self.counts, 0))):
            logits = self.model.logits(_at(self._hidden(tokens, known, attended), unknown)).float()
            uniforms = None if drawn is None else [numbers.gather(1, unknown) for numbers in drawn[step]]
            candidates = self._candidates(logits, uniforms)
            chosen, rest = self._choose(logits, candidates, uniforms, step, count - left)
            positions = unknown.gather(1, chosen)
            tokens = tokens.scatter(1, positions, candidates.gather(1, chosen))
            known = known.scatter(1, positions, True)
            if kept is not None:
                kept.scatter_(1, positions.unsqueeze(-1).expand(-1, -1, vocab), _at(logits, chosen).softmax(-1))
            unknown = unknown.gather(1, rest)
        return tokens, kept

    def _candidates(self, logits: torch.Tensor, uniforms: list[torch.Tensor] | None) -> torch.Tensor:
        """The predicted tokens (B, n) of logits (B, n, V)."""
        if self.sampling.temperature == 0 or uniforms is None:
            return logits.argmax(-1)
        scaled = logits.flatten(0, 1) / self.sampling.temperature
        found = sample(scaled, uniforms[0].reshape(-1, 1), self.sampling.top_k, self.sampling.top_p)
        return found.view(logits.shape[:2])

    def _choose(
        self, logits: torch.Tensor, candidates: torch.Tensor, uniforms: list[torch.Tensor] | None, step: int, count: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Which of the n candidates to keep, (B, count) int64, and the indices of the others in order.

        Only unknown tokens are candidates, so no token that was kept can be chosen again.
        """
        if count == candidates.shape[1]:
            everything = torch.arange(count, device=candidates.device).expand(candidates.shape[0], -1)
            return everything, everything[:, count:]
        confidence = logits.gather(2, candidates.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)
        scale = self.sampling.choice_temperature * (1 - (step + 1) / len(self.counts))
        if scale > 0:
            assert uniforms is not None
            gumbel = -(-uniforms[1].log()).log()
            confidence = confidence + scale * gumbel.float()
        order = confidence.argsort(dim=1, descending=True, stable=True)
        return order[:, :count], order[:, count:].sort(1).values


def _at(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The vectors of x (B, L, D) at positions (B, n): (B, n, D)."""
    return x.gather(1, positions.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
