"""Sampling: settings, filters and random numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.small import generate
from tests.support.token_models import make_images, make_lm
from uvim_fsq.config.schema import EvalConfig
from uvim_fsq.errors import UserError
from uvim_fsq.lm.sampling import Sampling, example_uniforms, sample


def test_top_1_sampling_is_greedy() -> None:
    lm, batch = make_lm(), make_images()
    assert torch.equal(generate(lm, batch, temperature=1.0, top_k=1), generate(lm, batch))


def test_filtered_tokens_are_never_drawn() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.2, 0.0]]))
    for u in (0.0, 0.4999, 0.51, 0.9999999):
        uniform = torch.tensor([[u]], dtype=torch.float64)
        assert int(sample(logits, uniform, None, None)) < 3
        assert int(sample(logits, uniform, None, 0.5)) == 0
        assert int(sample(logits, uniform, 2, None)) < 2


def test_sampling_follows_the_distribution() -> None:
    logits = torch.log(torch.tensor([0.5, 0.3, 0.2])).expand(20000, 3)
    drawn = sample(
        logits, torch.rand(20000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), None, None
    )
    shares = torch.bincount(drawn[:, 0], minlength=3) / 20000
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.3, 0.2]), atol=0.015, rtol=0)


def test_settings_at_their_limits_are_accepted() -> None:
    settings: list[dict[str, Any]] = [
        {"top_k": 1},
        {"top_p": 1.0},
        {"top_p": 1e-9},
        {"temperature": 0.0},
        {"temperature": 9.0},
    ]
    for setting in settings:
        Sampling(**{"temperature": 1.0, **setting})
    assert (Sampling().temperature, Sampling().top_k, Sampling().top_p) == (0, None, None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1e-9}, "temperature=-1e-09 is negative; 0 is greedy"),
        ({"top_k": 1, "top_p": 1.0}, "top_k and top_p are mutually exclusive"),
        ({"top_k": 0}, "top_k=0: keep at least one token"),
        ({"top_p": 0.0}, "top_p=0.0: must be above 0 and at most 1"),
        ({"top_p": 1.001}, "top_p=1.001: must be above 0"),
        ({"steps": 0}, "steps=0: decode in at least one step"),
        ({"choice_temperature": -0.5}, "choice_temperature=-0.5 is negative; 0 takes the most confident"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Sampling(**{"temperature": 1.0, **settings})


def test_a_configuration_gives_the_same_settings() -> None:
    config = EvalConfig(temperature=0.5, top_k=3, steps=4, choice_temperature=2.0)
    assert Sampling.of(config) == Sampling(0.5, 3, None, 4, 2.0)
    assert Sampling.of(EvalConfig()) == Sampling()


def test_results_depend_on_seeds_only_if_something_is_drawn() -> None:
    assert not Sampling(steps=4).is_random
    assert not Sampling(choice_temperature=0.1).is_random  # one step takes all tokens
    assert Sampling(0.1).is_random and Sampling(steps=2, choice_temperature=0.1).is_random


def test_random_numbers_depend_on_the_seed_of_each_image() -> None:
    seeds = torch.tensor([5, 2**40, 5])
    found = example_uniforms(seeds, 7)
    assert found.dtype == torch.float64 and found.shape == (3, 7)
    expected = torch.rand(7, generator=torch.Generator().manual_seed(2**40), dtype=torch.float64)
    assert torch.equal(found[1], expected) and torch.equal(found[0], found[2]) and not torch.equal(found[0], found[1])


@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"),
    [
        (None, None, [0.1, 0.4, 0.3, 0.2]),
        (1, None, [0, 1, 0, 0]),
        (2, None, [0, 4 / 7, 3 / 7, 0]),
        (9, None, [0.1, 0.4, 0.3, 0.2]),
        (None, 0.39, [0, 1, 0, 0]),
        (None, 0.41, [0, 4 / 7, 3 / 7, 0]),
        (None, 0.69, [0, 4 / 7, 3 / 7, 0]),
        (None, 0.71, [0, 4 / 9, 3 / 9, 2 / 9]),
        (None, 1.0, [0.1, 0.4, 0.3, 0.2]),
    ],
)
def test_draws_invert_the_filtered_distribution(top_k: int | None, top_p: float | None, kept: list[float]) -> None:
    logits = torch.tensor([0.1, 0.4, 0.3, 0.2]).log()[None] + 3
    upper = torch.tensor(kept, dtype=torch.float64).cumsum(0)
    for token, share in enumerate(kept):
        if share:
            for u in (upper[token] - share + 1e-6, upper[token] - 1e-6):
                assert int(sample(logits, u.view(1, 1), top_k, top_p)) == token
    assert sample(logits.expand(3, -1), torch.rand(3, 1, dtype=torch.float64), top_k, top_p).shape == (3, 1)


def test_a_token_without_probability_is_never_drawn() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]])
    drawn = [int(sample(logits, torch.tensor([[u]], dtype=torch.float64), None, None)) for u in (0, 0.4999, 0.5, 1)]
    assert drawn[:3] == [1, 1, 3]
    assert int(sample(torch.tensor([[0.0, 0.0]]), torch.zeros(1, 1, dtype=torch.float64), 1, None)) == 0  # a tie
