"""The masked model: masks, its loss, and log-probabilities under the deterministic schedule."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.token_models import make_images, make_lm, make_masked_lm
from uvim_fsq.lm import masked as module
from uvim_fsq.lm.masked import MaskedLM, random_masks
from uvim_fsq.lm.masked_schedules import uncovering_groups
from uvim_fsq.lm.sampling import Sampling

TOKENS = torch.randint(0, 11, (5, 9), generator=torch.Generator().manual_seed(2))


def fixed_masks(monkeypatch: pytest.MonkeyPatch, masked: torch.Tensor) -> None:
    monkeypatch.setattr(module, "random_masks", lambda *_: masked)


@pytest.fixture
def some_masked(monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """Masks (5, 9) with 1 to 9 masked positions, used by every training pass."""
    masked = torch.rand(5, 9, generator=torch.Generator().manual_seed(7)) < torch.linspace(0.1, 1, 5)[:, None]
    masked[:, 3] = True
    fixed_masks(monkeypatch, masked)
    return masked


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 8), st.integers(1, 40), st.floats(0, 1), st.floats(0, 1), st.integers(0, 2**31))
def test_masks_honour_the_floor_and_mask_something(
    batch: int, length: int, floor: float, all_masked: float, seed: int
) -> None:
    torch.manual_seed(seed)
    masks = random_masks(batch, length, floor, all_masked)
    counts = masks.sum(1)
    assert masks.shape == (batch, length) and masks.dtype == torch.bool
    assert int(counts.min()) >= max(1, floor * length - 1e-4) and int(counts.max()) <= length


def test_shares_of_masked_tokens_follow_the_cosine() -> None:
    torch.manual_seed(0)
    shares = random_masks(2000, 500, 0.45, 0.0).float().mean(1)
    assert float(shares.min()) >= 0.45
    for quantile in (0.1, 0.5, 0.9):
        # A uniform angle between 0 and arccos(0.45): small shares belong to large angles.
        expected = math.cos(math.acos(0.45) * (1 - quantile))
        assert float(shares.quantile(quantile)) == pytest.approx(expected, abs=0.02)


def test_numbers_of_masked_tokens_are_rounded_up() -> None:
    """Of two tokens, both are masked if the cosine is above 1/2, which is so for angles below 60 of 90 degrees."""
    torch.manual_seed(0)
    counts = random_masks(3000, 2, 0.0, 0.0).sum(1)
    assert set(counts.tolist()) == {1, 2}
    assert float((counts == 2).float().mean()) == pytest.approx(2 / 3, abs=0.03)


def test_everything_is_masked_as_often_as_asked() -> None:
    torch.manual_seed(0)
    assert bool(random_masks(50, 9, 0.0, 1.0).all())
    whole = random_masks(2000, 400, 0.0, 0.3).all(1).float().mean()
    assert float(whole) == pytest.approx(0.3, abs=0.06)  # and a few because the cosine is near 1


def test_every_position_is_masked_equally_often() -> None:
    torch.manual_seed(0)
    masks = random_masks(20000, 6, 0.0, 0.0)
    shares = masks.float().mean(0)
    assert float(shares.max() - shares.min()) < 0.02
    pairs = (masks[:, :1] == masks[:, 1:]).float().mean(0)
    assert float(pairs.max() - pairs.min()) < 0.02


@torch.no_grad()
def test_the_loss_is_the_mean_over_the_masked_positions(some_masked: torch.Tensor) -> None:
    lm = make_masked_lm()
    loss, logs = lm(make_images(), TOKENS)
    logits = lm.head(lm.hidden(TOKENS, ~some_masked, lm.memory_heads(lm.encode(make_images()))))
    for i in range(5):
        places = some_masked[i].nonzero()[:, 0]
        expected = F.cross_entropy(logits[i, places], TOKENS[i, places])
        torch.testing.assert_close(loss[i], expected)
        right = (logits[i, places].argmax(-1) == TOKENS[i, places]).float().mean()
        torch.testing.assert_close(logs["token_accuracy"][i], right)


def test_logits_of_visible_positions_have_no_gradient(some_masked: torch.Tensor) -> None:
    lm, seen = make_masked_lm(), []
    lm.head.register_forward_hook(lambda _, __, logits: seen.append(logits) or logits.retain_grad())

    def code_loss(probabilities: torch.Tensor, _: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return probabilities.square().sum((1, 2)), {}

    lm(make_images(), TOKENS, code_loss)[0].sum().backward()
    gradient = seen[0].grad
    assert not bool(gradient[~some_masked].any())
    assert bool(gradient[some_masked].any(-1).all()) and bool(gradient.isfinite().all())


@pytest.mark.parametrize("bf16", [False, True])
def test_the_code_loss_sees_true_tokens_where_nothing_is_predicted(some_masked: torch.Tensor, bf16: bool) -> None:
    lm, images, seen = make_masked_lm(), make_images(), []

    def code_loss(probabilities: torch.Tensor, features: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        seen.append((probabilities, features))
        return torch.full((5,), 2.0), {"task_loss": torch.ones(5)}

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        plain, _ = lm(images, TOKENS)
        loss, logs = lm(images, TOKENS, code_loss)
        memory = lm.encode(images)
        logits = lm.head(lm.hidden(TOKENS, ~some_masked, lm.memory_heads(memory)))
    ((probabilities, features),) = seen
    assert probabilities.dtype == torch.float32 and torch.equal(features, memory)
    assert torch.equal(probabilities[~some_masked], F.one_hot(TOKENS, 11).float()[~some_masked])
    torch.testing.assert_close(probabilities[some_masked], logits.float().softmax(-1)[some_masked])
    torch.testing.assert_close(loss, plain + 2)
    assert set(logs) == {"token_accuracy", "token_loss", "task_loss"} and torch.equal(logs["token_loss"], plain)


@torch.no_grad()
@pytest.mark.parametrize("make", [make_lm, make_masked_lm])
def test_smoothed_targets_are_spread_over_all_tokens(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fixed_masks(monkeypatch, torch.ones(5, 9, dtype=torch.bool))
    lm, images = make(), make_images()
    plain = lm(images, TOKENS)[0]
    object.__setattr__(lm.config, "label_smoothing", 0.1)
    try:
        smoothed = lm(images, TOKENS)[0]
    finally:
        object.__setattr__(lm.config, "label_smoothing", 0.0)
    if isinstance(lm, MaskedLM):
        nothing = torch.zeros(5, 9, dtype=torch.bool)
        logits = lm.head(lm.hidden(TOKENS, nothing, lm.memory_heads(lm.encode(images))))
    else:
        logits = lm.logits(images, TOKENS)
    uniform = -logits.log_softmax(-1).mean((1, 2))
    torch.testing.assert_close(smoothed, 0.9 * plain + 0.1 * uniform)


@torch.no_grad()
def test_the_blocks_get_embeddings_or_the_mask_with_positions_added() -> None:
    lm, known = make_masked_lm(), torch.arange(9).expand(5, -1) > 5
    lm.blocks = torch.nn.ModuleList()
    embedded = torch.where(known[..., None], lm.token_embedding(TOKENS), lm.mask)
    torch.testing.assert_close(lm.hidden(TOKENS, known, []), lm.norm(embedded + lm.positions))


@torch.no_grad()
def test_unknown_tokens_are_not_seen_and_known_ones_are_seen_from_both_sides() -> None:
    lm, known = make_masked_lm(), torch.zeros(5, 9, dtype=torch.bool)
    known[:, 4] = True
    attended = lm.memory_heads(lm.encode(make_images()))
    before = lm.hidden(TOKENS, known, attended)
    hidden_change = torch.where(known, TOKENS, (TOKENS + 1) % 11)
    assert torch.equal(lm.hidden(hidden_change, known, attended), before)
    after = lm.hidden(torch.where(known, (TOKENS + 1) % 11, TOKENS), known, attended)
    for place in (0, 8):
        assert not torch.allclose(after[:, place], before[:, place])


def test_masks_of_a_step_follow_the_seed() -> None:
    lm, losses = make_masked_lm(), []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        losses.append(lm(make_images(), TOKENS)[0])
    assert torch.equal(losses[0], losses[1]) and not torch.equal(losses[0], losses[2])


@torch.no_grad()
@pytest.mark.parametrize("length", [4, 9, 16])
def test_log_probabilities_are_those_of_each_group_given_the_earlier_ones(length: int) -> None:
    lm, images = make_masked_lm(length), make_images(2)
    tokens = torch.randint(0, 11, (2, length), generator=torch.Generator().manual_seed(3))
    found = lm.log_prob(images, tokens)
    assert found.shape == (2, length) and found.dtype == torch.float32
    expected, given_places = torch.full((2, length), math.nan), list[int]()
    for group in uncovering_groups(length):
        for i in range(2):
            known = torch.zeros(1, length, dtype=torch.bool)
            known[0, given_places] = True
            only_given = torch.where(known, tokens[i : i + 1], 0)
            attended = lm.memory_heads(lm.encode(images[i : i + 1]))
            distributions = lm.head(lm.hidden(only_given, known, attended))[0].log_softmax(-1)
            for place in group:
                expected[i, place] = distributions[place, tokens[i, place]]
        given_places += group
    torch.testing.assert_close(found, expected)


def test_log_probabilities_can_be_trained_on() -> None:
    lm = make_masked_lm()
    lm.log_prob(make_images(), TOKENS).sum().backward()
    assert lm.mask.grad is not None and bool(lm.mask.grad.any())


@pytest.mark.slow
def test_training_memorizes_a_few_images() -> None:
    lm, images = make_masked_lm().train(), make_images()
    optimizer = torch.optim.AdamW(lm.parameters(), lr=3e-3)
    loss = torch.zeros(5)
    for step in range(250):
        torch.manual_seed(step)
        loss, _ = lm(images, TOKENS)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    assert float(loss.detach().mean()) < 0.05
    lm.eval()
    for steps in (1, 4):
        assert torch.equal(lm.generate(images, Sampling(steps=steps)).tokens, TOKENS)
