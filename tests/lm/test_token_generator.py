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
def test_cached_equals_naive_and_no_batch_matters(temperature: float, filters: dict) -> None:
    lm, batch, seeds = make_lm(), make_images(), torch.tensor([3, 1, 4, 1, 5])
    cached = generate(lm, batch, temperature=temperature, seeds=seeds, **filters)
    assert torch.equal(cached, generate_without_cache(lm, batch, temperature, seeds, **filters))
    alone = [
        generate(lm, batch[i : i + 1], temperature=temperature, seeds=seeds[i : i + 1], **filters) for i in range(5)
    ]
    assert torch.equal(cached, torch.cat(alone))
    assert int(cached.min()) >= 0 and int(cached.max()) < 11


@pytest.mark.parametrize("length", [CACHE_BLOCK - 1, CACHE_BLOCK, CACHE_BLOCK + 1, 2 * CACHE_BLOCK + 7])
def test_long_codes_equal_naive_decoding(length: int) -> None:
    """Steps that read the cache in part."""
    lm, batch = make_lm(length), make_images(2)
    seeds = torch.arange(2)
    assert torch.equal(generate(lm, batch, temperature=1.0, seeds=seeds), generate_without_cache(lm, batch, 1.0, seeds))


def test_a_decoder_is_used_again() -> None:
    lm, first, second = make_lm(), make_images(), make_images().flip(0)
    generator = TokenGenerator(lm)
    assert torch.equal(generator(first), generate(lm, first)) and torch.equal(generator(second), generate(lm, second))
    assert torch.equal(generator(first[:2]), generate(lm, first[:2])) and torch.equal(
        generator(first), generate(lm, first)
    )
    assert list(generator._pool.by_size) == [5]  # sizes near each other do not add up
    torch.nn.init.normal_(lm.blocks[0].self_attn.value.weight)
    assert torch.equal(
        generator(first), generate_without_cache(lm, first, 0.0, torch.arange(5))
    )  # the weights of the moment


def test_a_decoder_is_gone_when_nobody_holds_it() -> None:
    """Its buffers are gigabytes; they cannot wait for the search for cycles."""
    generator = TokenGenerator(make_lm())
    generator(make_images())
    left = weakref.ref(generator)
    del generator
    assert left() is None


def test_bf16_decoding_leaves_the_model_alone() -> None:
    lm = make_lm()
    generator = TokenGenerator(lm, precision="bf16")
    assert lm.blocks[0].mlp.fc1.weight.dtype == torch.float32
    tokens = generator(make_images())
    assert tokens.shape == (5, 9) and (tokens == generate(lm, make_images())).float().mean() > 0.6


@pytest.mark.slow
@needs_compiler
def test_a_compiled_step_decodes_as_the_plain_one() -> None:
    lm, batch = make_lm(CACHE_BLOCK + 5), make_images()
    generator = TokenGenerator(lm, Sampling(1.0, top_k=5), compile=True)
    assert torch.equal(generator(batch), generate(lm, batch, temperature=1.0, top_k=5))


def test_compiling_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="compiling needs a C\\+\\+ compiler"):
        TokenGenerator(make_lm(), compile=True)


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_captured_step_decodes_as_the_plain_one(compile: bool, temperature: float) -> None:
    lm, batch = make_lm(CACHE_BLOCK + 5).cuda(), make_images().cuda()
    plain = generate_without_cache(lm.cpu(), batch.cpu(), temperature, torch.arange(5))
    generator = TokenGenerator(lm.cuda(), Sampling(temperature), compile=compile)
    for count in (5, 3, 5):  # the smaller batch is padded
        assert torch.equal(generator(batch[:count]).cpu(), plain[:count])
    assert len(generator._pool.by_size) == 1
