"""Tokens are chosen from float32 logits in bf16, too."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.support.token_models import make_images, make_lm
from uvim_fsq.lm.sampling import Sampling, example_uniforms, sample
from uvim_fsq.lm.token_generator import TokenGenerator


class LastHidden:
    """The hidden states that a generator's final norm was given, (B, D) per step; `all` is (B, L, D)."""

    def __init__(self, norm: nn.Module) -> None:
        self.seen: list[torch.Tensor] = []
        norm.register_forward_pre_hook(lambda _, inputs: self.seen.append(inputs[0].clone()))

    def all(self) -> torch.Tensor:
        return torch.stack(self.seen, 1)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.5), Sampling(1.0, top_k=3)], ids=["0", "0.5", "top 3"])
def test_tokens_of_bf16_generation_are_chosen_from_float32_logits(sampling: Sampling) -> None:
    """The logits are so close together that many are equal in bf16."""
    lm, batch = make_lm(), make_images(64)
    nn.init.normal_(lm.head.weight, std=0.02)
    nn.init.constant_(lm.head.bias, 20.0)
    generator = TokenGenerator(lm, sampling, precision="bf16")
    hidden = LastHidden(generator.model.norm)
    tokens = generator(batch).tokens
    with torch.no_grad():
        logits = lm.head(lm.norm(hidden.all().float()))
    uniforms = example_uniforms(torch.arange(64), lm.length)

    def chosen(logits: torch.Tensor) -> torch.Tensor:
        if sampling.temperature == 0:
            return logits.argmax(-1)
        flat = logits.flatten(0, 1) / sampling.temperature
        return sample(flat, uniforms.view(-1, 1), sampling.top_k, sampling.top_p).view(64, -1)

    assert torch.equal(tokens, chosen(logits))
    assert not torch.equal(tokens, chosen(logits.bfloat16().float()))  # else this would test nothing
