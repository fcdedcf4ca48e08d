"""Decoding in steps equals its specification, whatever the batch."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tests.support.compiler import needs_compiler
from tests.support.token_models import generate_by_confidence, make_images, make_lm, make_masked_lm
from uvim_fsq.errors import UserError
from uvim_fsq.lm.masked import MaskedLM
from uvim_fsq.lm.masked_generator import MaskedGenerator
from uvim_fsq.lm.masked_schedules import unknown_counts
from uvim_fsq.lm.sampling import Sampling

SAMPLINGS = [
    Sampling(),
    Sampling(steps=4),
    Sampling(steps=9),
    Sampling(1.0),
    Sampling(1.0, steps=3),
    Sampling(0.7, top_k=3, steps=4),
    Sampling(1.3, top_p=0.6, steps=5, choice_temperature=2.0),
    Sampling(steps=4, choice_temperature=4.5),
]
SEEDS = torch.tensor([3, 1, 4, 1, 5])


def passes_of(lm: MaskedLM, generate: Callable[[], Any]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(tokens, known) of every pass that `generate` makes, and of the result, where everything is known."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    real = lm.hidden

    def hidden(tokens: torch.Tensor, known: torch.Tensor, attended: Any) -> torch.Tensor:
        seen.append((tokens.clone(), known.clone()))
        return real(tokens, known, attended)

    lm.hidden = hidden
    tokens = generate().tokens
    return [*seen, (tokens, torch.ones_like(tokens, dtype=torch.bool))]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_decoding_equals_its_specification_in_any_batch(sampling: Sampling) -> None:
    lm, images = make_masked_lm(), make_images()
    found = lm.generate(images, sampling, SEEDS).tokens
    assert torch.equal(found, generate_by_confidence(lm, images, sampling, SEEDS)[0])
    alone = [lm.generate(images[i : i + 1], sampling, SEEDS[i : i + 1]).tokens for i in range(5)]
    assert torch.equal(found, torch.cat(alone))
    assert int(found.min()) >= 0 and int(found.max()) < 11


@torch.no_grad()
def test_one_step_is_one_pass_with_everything_masked() -> None:
    lm, images = make_masked_lm(), make_images()
    nothing = torch.zeros(5, 9, dtype=torch.bool)
    logits = lm.head(lm.hidden(torch.zeros(5, 9, dtype=torch.long), nothing, lm.memory_heads(lm.encode(images))))
    for sampling in (Sampling(), Sampling(steps=1)):
        found = lm.generate(images, sampling, probabilities=True)
        assert torch.equal(found.tokens, logits.argmax(-1))
        assert found.probabilities is not None and found.features is not None
        torch.testing.assert_close(found.probabilities, logits.softmax(-1))
        assert torch.equal(found.features, lm.encode(images))


@settings(max_examples=15, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(st.integers(1, 9), st.sampled_from([0.0, 1.0]), st.sampled_from([0.0, 3.0]), st.integers(0, 2**40))
def test_steps_keep_the_scheduled_counts_and_never_change_a_token(
    steps: int, temperature: float, choice_temperature: float, seed: int
) -> None:
    lm, sampling = make_masked_lm(), Sampling(temperature, steps=steps, choice_temperature=choice_temperature)
    seen = passes_of(lm, lambda: lm.generate(make_images(2), sampling, torch.tensor([seed, seed + 1])))
    assert len(seen) == steps + 1
    counts = (*unknown_counts(9, steps), 0)
    for ((tokens, known), count), ((later, known_later), _) in itertools.pairwise(zip(seen, counts, strict=True)):
        assert torch.equal((~known).sum(1), torch.full((2,), count))
        assert bool((known_later | ~known).all()) and torch.equal(tokens[known], later[known])


def test_as_many_steps_as_tokens_determine_one_each() -> None:
    lm = make_masked_lm()
    seen = passes_of(lm, lambda: lm.generate(make_images(2), Sampling(steps=9)))
    assert [int(known.sum()) for _, known in seen] == [2 * count for count in range(10)]


def test_of_equally_confident_tokens_the_first_are_kept() -> None:
    lm = make_masked_lm()
    torch.nn.init.zeros_(lm.head.weight)
    seen = passes_of(lm, lambda: lm.generate(make_images(2), Sampling(steps=4)))
    for _, known in seen:
        count = int(known[0].sum())
        assert bool(known[:, :count].all()) and not bool(known[:, count:].any())


def test_equal_confidences_in_a_later_step_are_kept_in_the_order_of_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after a step in which later positions were more confident than earlier ones."""
    assert unknown_counts(9, 4) == (9, 8, 6, 3)
    lm, certainties = make_masked_lm(), [torch.arange(9.0), torch.zeros(8), torch.zeros(6), torch.zeros(3)]

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        found = torch.zeros(*hidden.shape[:2], 11)
        found[..., 0] = certainties.pop(0)
        return found

    monkeypatch.setattr(lm, "logits", logits)
    seen = passes_of(lm, lambda: lm.generate(make_images(1), Sampling(steps=4)))
    known = [known[0].nonzero()[:, 0].tolist() for _, known in seen]
    assert known == [[], [8], [0, 1, 8], [0, 1, 2, 3, 4, 8], list(range(9))]


@torch.no_grad()
def test_probabilities_are_those_of_the_step_that_kept_the_token() -> None:
    lm, images, sampling = make_masked_lm(), make_images(), Sampling(0.5, steps=3)
    found = lm.generate(images, sampling, SEEDS, probabilities=True)
    assert found.probabilities is not None and found.probabilities.dtype == torch.float32
    tokens, kept_in = generate_by_confidence(lm, images, sampling, SEEDS)
    attended = lm.memory_heads(lm.encode(images))
    for step in range(3):
        kept = kept_in == step
        distributions = lm.head(lm.hidden(tokens, kept_in < step, attended)).softmax(-1)
        torch.testing.assert_close(found.probabilities[kept], distributions[kept])


def test_probabilities_are_returned_only_if_asked_for() -> None:
    lm, images = make_masked_lm(), make_images(1)
    for generate in (lm.generate, lm.generator(), MaskedGenerator(lm)):
        assert generate(images).probabilities is None  # pyright: ignore[reportCallIssue]
    assert lm.generator(probabilities=True)(images, None).probabilities is not None


def test_nothing_is_compiled_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []
    monkeypatch.setattr("uvim_fsq.lm.masked_generator.compiled", lambda fn, **_: compiled.append(fn) or fn)
    lm = make_masked_lm()
    for generate in (lm.generator(), MaskedGenerator(lm), lm.generator(compile=True)):
        generate(make_images(1), None)
    assert compiled == [lm.hidden]


def test_the_image_is_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, calls = make_masked_lm(), []
    for name in ("encode", "memory_heads"):
        real = getattr(lm, name)
        monkeypatch.setattr(lm, name, lambda x, real=real, name=name: calls.append(name) or real(x))
    lm.generate(make_images(2), Sampling(steps=5))
    assert calls == ["encode", "memory_heads"]


def test_the_default_seed_of_an_image_is_its_place_in_the_batch() -> None:
    lm, images = make_masked_lm(), make_images()
    generator = lm.generator(Sampling(2.0, steps=3))
    tokens = generator(images, None).tokens
    assert torch.equal(tokens, generator(images, torch.arange(5)).tokens)
    assert not torch.equal(tokens, generator(images, torch.arange(1, 6)).tokens)


def test_noise_on_the_confidence_changes_the_order_by_seed() -> None:
    lm, images, seeds = make_masked_lm(), make_images(1).expand(30, -1, -1, -1), torch.arange(30)
    sampling = Sampling(steps=4, choice_temperature=0.5)
    seen = passes_of(lm, lambda: lm.generate(images, sampling, seeds))
    kept_in = generate_by_confidence(lm, images, sampling, seeds)[1]
    assert len(kept_in.unique(dim=0)) > 20
    for step in range(4):
        assert torch.equal(seen[step][1], kept_in < step)


def test_bf16_decoding_does_not_change_the_model() -> None:
    lm, images = make_masked_lm(), make_images()
    generator = MaskedGenerator(lm, Sampling(steps=4), precision="bf16")
    assert lm.blocks[0].get_parameter("mlp.fc1.weight").dtype == torch.float32
    kinds = {name: p.dtype for name, p in generator.model.named_parameters()}  # pyright: ignore
    assert kinds["blocks.0.mlp.fc1.weight"] == kinds["encoder.model.blocks.0.attn.qkv.weight"] == torch.bfloat16
    for name in ("head.weight", "norm.weight", "token_embedding.weight", "positions", "mask"):
        assert kinds[name] == torch.float32
    found = generator(images).tokens
    assert (found == lm.generate(images, Sampling(steps=4)).tokens).float().mean() > 0.6


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_confidences_are_compared_in_float32(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    generator, dtypes = MaskedGenerator(make_masked_lm(), Sampling(steps=4), precision=precision), []
    real = generator.model.logits

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        dtypes.append((torch.is_autocast_enabled("cpu"), real(hidden).dtype))
        return real(hidden)

    monkeypatch.setattr(generator.model, "logits", logits)
    for around in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=around):
            generator(make_images(2))
    assert dtypes == [(precision == "bf16", torch.float32)] * 8


def test_a_generator_uses_the_present_weights() -> None:
    lm, images = make_masked_lm(), make_images()
    generator = lm.generator(Sampling(steps=3))
    generator(images, None)
    torch.nn.init.normal_(lm.head.weight)
    assert torch.equal(generator(images, None).tokens, lm.generate(images, Sampling(steps=3)).tokens)


@pytest.mark.slow
@needs_compiler
def test_a_compiled_pass_gives_the_tokens_of_the_eager_one() -> None:
    lm, images, sampling = make_masked_lm(), make_images(), Sampling(1.0, steps=4)
    found = lm.generator(sampling, compile=True)(images, SEEDS).tokens
    assert torch.equal(found, lm.generate(images, sampling, SEEDS).tokens)


@pytest.mark.gpu
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_a_gpu_gives_the_tokens_of_a_cpu(sampling: Sampling) -> None:
    lm, images = make_masked_lm(), make_images()
    expected = lm.generate(images, sampling, SEEDS).tokens
    assert torch.equal(lm.cuda().generate(images.cuda(), sampling, SEEDS).tokens.cpu(), expected)


def test_more_steps_than_tokens_are_refused() -> None:
    lm = make_masked_lm()
    for generate in (lambda s: lm.generate(make_images(1), s), lm.generator):
        with pytest.raises(UserError, match="eval.steps=10 exceeds the 9 tokens of an image; lower it"):
            generate(Sampling(steps=10))


def test_8_bit_keys_and_values_are_refused() -> None:
    with pytest.raises(UserError, match="eval.int8_cross_kv=true: token model MaskedLM does not support it"):
        make_masked_lm().generator(int8_cross_kv=True)


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        (Sampling(steps=1), "eval.steps=1: model.kind=autoregressive does not decode in steps; set it to null"),
        (
            Sampling(choice_temperature=0.5),
            "eval.choice_temperature=0.5: model.kind=autoregressive does not decode in steps; set it to 0",
        ),
    ],
)
def test_the_autoregressive_model_refuses_steps(sampling: Sampling, message: str) -> None:
    lm = make_lm()
    for generate in (lambda s: lm.generate(make_images(1), s), lm.generator):
        with pytest.raises(UserError, match=message):
            generate(sampling)
