"""Cached generation equals generation without a cache, whatever the batch."""

from __future__ import annotations

import weakref

import pytest
import torch

from tests.support.compiler import needs_compiler
from tests.support.small import generate
from tests.support.token_models import generate_without_cache, make_images, make_lm
from uvim_fsq.errors import UserError
from uvim_fsq.lm.sampling import Sampling
from uvim_fsq.lm.token_generator import CACHE_BLOCK, TokenGenerator


@pytest.mark.parametrize(("temperature", "filters"), [(0, {}), (1.0, {}), (0.7, {"top_k": 3}), (1.3, {"top_p": 0.6})])
def test_cached_generation_equals_the_uncached_one_in_any_batch(temperature: float, filters: dict) -> None:
    lm, batch, seeds = make_lm(), make_images(), torch.tensor([3, 1, 4, 1, 5])
    cached = generate(lm, batch, temperature=temperature, seeds=seeds, **filters)
    assert torch.equal(cached, generate_without_cache(lm, batch, temperature, seeds, **filters))
    alone = [
        generate(lm, batch[i : i + 1], temperature=temperature, seeds=seeds[i : i + 1], **filters) for i in range(5)
    ]
    assert torch.equal(cached, torch.cat(alone))
    assert int(cached.min()) >= 0 and int(cached.max()) < 11


@pytest.mark.slow
@pytest.mark.parametrize("length", [CACHE_BLOCK - 1, CACHE_BLOCK, CACHE_BLOCK + 1, 2 * CACHE_BLOCK + 7])
def test_codes_longer_than_a_cache_block_equal_uncached_generation(length: int) -> None:
    lm, batch = make_lm(length), make_images(2)
    seeds = torch.arange(2)
    assert torch.equal(generate(lm, batch, temperature=1.0, seeds=seeds), generate_without_cache(lm, batch, 1.0, seeds))


def test_a_generator_can_be_used_again() -> None:
    lm, first, second = make_lm(), make_images(), make_images().flip(0)
    generator = TokenGenerator(lm)
    for batch in (first, second, first[:2], first):
        assert torch.equal(generator(batch).tokens, generate(lm, batch))
    torch.nn.init.normal_(lm.blocks[0].self_attn.value.weight)
    # The present weights are used, not those at construction.
    assert torch.equal(generator(first).tokens, generate_without_cache(lm, first, 0.0, torch.arange(5)))


def test_a_generator_is_freed_without_garbage_collection() -> None:
    """Its buffers are gigabytes; they cannot wait until Python looks for reference cycles."""
    generator = TokenGenerator(make_lm())
    generator(make_images())
    reference = weakref.ref(generator)
    del generator
    assert reference() is None


def test_bf16_generation_does_not_change_the_model() -> None:
    lm = make_lm()
    generator = TokenGenerator(lm, precision="bf16")
    assert lm.blocks[0].mlp.fc1.weight.dtype == torch.float32
    tokens = generator(make_images()).tokens
    assert tokens.shape == (5, 9) and (tokens == generate(lm, make_images())).float().mean() > 0.6


@pytest.mark.slow
@needs_compiler
def test_a_compiled_step_gives_the_tokens_of_the_eager_one() -> None:
    lm, batch = make_lm(CACHE_BLOCK + 5), make_images()
    generator = TokenGenerator(lm, Sampling(1.0, top_k=5), compile=True)
    assert torch.equal(generator(batch).tokens, generate(lm, batch, temperature=1.0, top_k=5))


def test_compiling_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="compilation needs a C\\+\\+ compiler"):
        TokenGenerator(make_lm(), compile=True)


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_captured_step_gives_the_tokens_of_the_eager_one(compile: bool, temperature: float) -> None:
    lm, batch = make_lm(CACHE_BLOCK + 5).cuda(), make_images().cuda()
    expected = generate_without_cache(lm.cpu(), batch.cpu(), temperature, torch.arange(5))
    generator = TokenGenerator(lm.cuda(), Sampling(temperature), compile=compile)
    for count in (5, 3, 5):  # the smaller batch is padded
        assert torch.equal(generator(batch[:count]).tokens.cpu(), expected[:count])
    assert len(generator._pool.by_size) == 1
