"""Sampling of tokens from logits, reproducible and independent of the batch.

B batch, L code length, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from uvim_fsq.config.rules import check_sampling, is_random
from uvim_fsq.config.schema import SAMPLING_KEYS, EvalConfig


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen from their logits.

    Attributes:
        temperature: 0 takes the argmax; larger values sample.
        top_k: sample among the k most likely tokens. Cannot be combined with top_p.
        top_p: sample among the smallest set of most likely tokens whose total probability reaches top_p.
        steps: T, the number of steps in which a masked model decodes; None is one. Other models have no other value.
        choice_temperature: masked models: scale of the Gumbel noise on the confidences that decide which tokens a step
            keeps. It falls linearly to 0 in the last step, so it has no effect if that is the only one.

    Raises UserError for invalid settings.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    steps: int | None = None
    choice_temperature: float = 0.0

    def __post_init__(self) -> None:
        check_sampling(self.temperature, self.top_k, self.top_p, self.steps, self.choice_temperature)

    @classmethod
    def of(cls, config: EvalConfig) -> Sampling:
        """The settings of a configuration's `eval` section."""
        return cls(**{key: getattr(config, key) for key in SAMPLING_KEYS})

    @property
    def is_random(self) -> bool:
        """Whether the result depends on the seeds."""
        return is_random(self.temperature, self.steps, self.choice_temperature)


GREEDY = Sampling()


def example_uniforms(seeds: torch.Tensor, length: int) -> torch.Tensor:
    """(B,) int64 seeds -> (B, L) float64 in [0, 1). Each row has its own generator."""
    rows = [
        torch.rand(length, generator=torch.Generator().manual_seed(int(seed)), dtype=torch.float64) for seed in seeds
    ]
    return torch.stack(rows)


def sample(logits: torch.Tensor, uniform: torch.Tensor, top_k: int | None, top_p: float | None) -> torch.Tensor:
    """Inverse-CDF sampling from float32 logits (B, V) with uniforms (B, 1) float64 -> tokens (B, 1) int64.

    The CDF follows the order of the vocabulary. In the order of the probabilities, rounding could swap two nearly equal
    ones. A token that has probability 0 or was filtered out is never chosen.
    """
    probabilities = logits.double().softmax(1)
    if top_k is not None:
        smallest = probabilities.topk(min(top_k, probabilities.shape[1]), dim=1).values[:, -1:]
        probabilities = probabilities * (probabilities >= smallest)
    if top_p is not None:
        ordered = probabilities.sort(dim=1, descending=True).values
        # A token is kept if the more likely ones sum to less than top_p. The most likely one is always kept.
        smallest = ordered.masked_fill(ordered.cumsum(1) - ordered >= top_p, 1.0).amin(1, keepdim=True)
        probabilities = probabilities * (probabilities >= smallest)
    cumulative = probabilities.cumsum(1)
    return (cumulative <= uniform * cumulative[:, -1:]).sum(1, keepdim=True)
