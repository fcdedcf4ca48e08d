"""The autoregressive LM: normalization, teacher forcing, causality."""

from __future__ import annotations

import pytest
import torch

from tests.support.token_models import make_images, make_lm
from uvim_fsq.lm.token_generator import TokenGenerator


@torch.no_grad()
def test_floating_and_8_bit_images_are_normalized_alike() -> None:
    """With the mean and deviation of the encoder's weights, here those of ImageNet."""
    lm, batch = make_lm(), make_images()
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    lm.load_state_dict(lm.state_dict() | {"encoder.mean": mean, "encoder.std": std})
    torch.testing.assert_close(lm.encoder.normalize(batch), (batch.float() / 255 - mean) / std, atol=1e-5, rtol=0)
    floating = batch.float() / 127.5 - 1
    torch.testing.assert_close(lm.encode(floating), lm.encode(batch), atol=1e-5, rtol=0)
    assert torch.equal(TokenGenerator(lm)(floating).tokens, TokenGenerator(lm)(batch).tokens)


@torch.no_grad()
@pytest.mark.parametrize("span", [None, 3])
def test_logits_of_single_steps_equal_teacher_forced_ones(span: int | None) -> None:
    lm, tokens = make_lm(), torch.randint(0, 11, (5, 9))
    memory = lm.encode(make_images())
    whole, cache = lm.decode(tokens, memory), lm.new_cache(memory)
    previous = torch.zeros(5, 1, dtype=torch.long)
    for i in range(span or 9):
        torch.testing.assert_close(lm.decode_step(previous, cache, span), whole[:, i], atol=1e-5, rtol=1e-4)
        cache.position += 1
        previous = tokens[:, i : i + 1]


@torch.no_grad()
def test_logits_do_not_depend_on_later_tokens() -> None:
    lm, tokens = make_lm(), torch.randint(0, 11, (5, 9))
    memory, changed = lm.encode(make_images()), tokens.clone()
    changed[:, 4] = (changed[:, 4] + 1) % 11
    one, two = lm.decode(tokens, memory), lm.decode(changed, memory)
    assert torch.equal(one[:, :5], two[:, :5])
    assert not torch.allclose(one[:, 5:], two[:, 5:])
