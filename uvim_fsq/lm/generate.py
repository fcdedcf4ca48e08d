"""Decoding: image -> tokens, one position at a time with a cache. Free functions over an LM; no host synchronisation
inside the loop. Results do not depend on the batch an image was decoded in.

B batch, L code length, V vocabulary.
"""

from __future__ import annotations

import torch

from uvim_fsq.errors import UserError
from uvim_fsq.lm.model import LM


def generate(
    model: LM,
    images: torch.Tensor,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seeds: torch.Tensor | None = None,
) -> torch.Tensor:
    """Predicts the tokens of `images` (B, 3, S, S) uint8 -> (B, L) int64 in [0, V).

    Args:
        temperature: 0 takes the argmax; above 0 samples.
        top_k: sample among the k likeliest tokens. Not together with top_p.
        top_p: sample among the fewest likeliest tokens that hold this much probability.
        seeds: (B,) int64, one stream of random numbers per example; default 0..B-1. Unused when greedy.

    Raises UserError for impossible settings.
    """
    check_sampling(temperature, top_k, top_p)
    with torch.inference_mode():
        return generate_from_memory(
            model, model.encode(images), temperature=temperature, top_k=top_k, top_p=top_p, seeds=seeds
        )


def generate_from_memory(
    model: LM,
    memory: torch.Tensor,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seeds: torch.Tensor | None = None,
) -> torch.Tensor:
    """`generate` for an encoded image: memory (B, M, E) -> (B, L) int64."""
    batch, device = len(memory), memory.device
    uniforms = None
    if temperature > 0:
        uniforms = example_uniforms(torch.arange(batch) if seeds is None else seeds, model.length).to(device)
    cache = model.new_cache(memory)
    tokens = torch.zeros(batch, model.length, dtype=torch.long, device=device)
    previous = tokens[:, :1]
    for i in range(model.length):
        logits = model.decode(previous, None, cache)[:, 0].float()
        if uniforms is None:
            previous = logits.argmax(-1, keepdim=True)
        else:
            previous = sample(logits / temperature, uniforms[:, i : i + 1], top_k, top_p)
        tokens[:, i : i + 1] = previous
    return tokens


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raises UserError for a negative temperature, both filters at once, or filters out of range."""
    if temperature < 0:
        raise UserError(f"temperature={temperature} is negative; 0 is greedy")
    if top_k is not None and top_p is not None:
        raise UserError("top_k and top_p exclude each other; give one of them")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k={top_k}: keep at least one token")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p={top_p}: must be above 0 and at most 1")


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
    probabilities = logits.double().softmax(-1)
    if top_k is not None:
        smallest = probabilities.topk(min(top_k, probabilities.shape[-1]), dim=-1).values[:, -1:]
        probabilities = probabilities * (probabilities >= smallest)
    if top_p is not None:
        ordered = probabilities.sort(dim=-1, descending=True).values
        # A token stays if those before it hold less than top_p; the likeliest always stays.
        smallest = ordered.masked_fill(ordered.cumsum(-1) - ordered >= top_p, 1.0).amin(-1, keepdim=True)
        probabilities = probabilities * (probabilities >= smallest)
    cumulative = probabilities.cumsum(-1)
    return (cumulative <= uniform * cumulative[:, -1:]).sum(-1, keepdim=True)
