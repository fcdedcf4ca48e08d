"""Small token models, their images, and autoregressive generation without a cache as the specification."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from uvim_fsq.config.schema import EncoderConfig, LMModelConfig
from uvim_fsq.lm.autoregressive import AutoregressiveLM
from uvim_fsq.lm.masked import MaskedLM
from uvim_fsq.lm.sampling import Sampling, example_uniforms, sample

ENCODER = EncoderConfig(name="vit_tiny_patch16_224", patch_size=8, width=16, depth=1, num_heads=2, mlp_dim=32)
CONFIG = LMModelConfig(encoder=ENCODER, width=24, depth=2, num_heads=2, mlp_dim=32)


def make_lm(length: int = 9) -> AutoregressiveLM:
    """An LM for 32 x 32 images and 11 tokens, with a head that is not zero."""
    torch.manual_seed(0)
    lm = AutoregressiveLM(CONFIG, image_size=32, vocab_size=11, length=length).eval()
    torch.nn.init.normal_(lm.head.weight)
    return lm


def make_masked_lm(length: int = 9, **settings: Any) -> MaskedLM:
    """A masked model of the same size; `settings` are keys of `model`."""
    torch.manual_seed(0)
    lm = MaskedLM(replace(CONFIG, kind="masked", **settings), image_size=32, vocab_size=11, length=length).eval()
    torch.nn.init.normal_(lm.head.weight, std=0.3)
    lm.positions.data *= 5  # so that positions, and what is known around them, differ
    return lm


def make_images(count: int = 5) -> torch.Tensor:
    """(count, 3, 32, 32) uint8."""
    return torch.randint(0, 256, (count, 3, 32, 32), generator=torch.Generator().manual_seed(1)).to(torch.uint8)


@torch.no_grad()
def generate_without_cache(
    lm: AutoregressiveLM, image: torch.Tensor, temperature: float, seeds: torch.Tensor, **filters: float
) -> torch.Tensor:
    """Repeats the whole teacher-forced pass for every token."""
    memory = lm.encode(image)
    uniforms = example_uniforms(seeds, lm.length)
    tokens = torch.zeros(len(image), lm.length, dtype=torch.long)
    for i in range(lm.length):
        logits = lm.decode(tokens, memory)[:, i]
        if temperature == 0:
            tokens[:, i] = logits.argmax(-1)
        else:
            top_k, top_p = filters.get("top_k"), filters.get("top_p")
            k = int(top_k) if top_k is not None else None
            tokens[:, i] = sample(logits / temperature, uniforms[:, i : i + 1], k, top_p)[:, 0]
    return tokens


@torch.no_grad()
def generate_by_confidence(
    lm: MaskedLM, image: torch.Tensor, sampling: Sampling, seeds: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One image and one position after the other: tokens (B, L) and the step (B, L) that kept each."""
    steps = sampling.steps or 1
    tokens, kept_in = torch.zeros(len(image), lm.length, dtype=torch.long), torch.full((len(image), lm.length), -1)
    for i in range(len(image)):
        attended = lm.memory_heads(lm.encode(image[i : i + 1]))
        drawn = example_uniforms(seeds[i : i + 1], 2 * steps * lm.length).view(steps, 2, lm.length)
        for step in range(steps):
            known = kept_in[i : i + 1] >= 0
            logits = lm.head(lm.hidden(tokens[i : i + 1], known, attended))[0]
            found: list[tuple[float, int, int]] = []
            for place in range(lm.length):
                if known[0, place]:
                    continue
                token = int(logits[place].argmax())
                if sampling.temperature:
                    scaled = logits[place : place + 1] / sampling.temperature
                    token = int(sample(scaled, drawn[step, :1, place : place + 1], sampling.top_k, sampling.top_p))
                confidence = float(logits[place].log_softmax(0)[token])
                gumbel = -math.log(-math.log(float(drawn[step, 1, place])))
                confidence += sampling.choice_temperature * (1 - (step + 1) / steps) * gumbel
                found.append((-confidence, place, token))
            left = min(math.floor(lm.length * math.cos(math.pi / 2 * (step + 1) / steps)), len(found) - 1)
            for _, place, token in sorted(found)[: len(found) - (left if step < steps - 1 else 0)]:
                tokens[i, place], kept_in[i, place] = token, step
    return tokens, kept_in
