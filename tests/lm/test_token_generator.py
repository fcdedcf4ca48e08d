"""Cached generation equals generation without a cache, whatever the batch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.compiler import needs_compiler
from tests.support.small import generate
from tests.support.token_models import generate_without_cache, make_images, make_lm
from uvim_fsq.errors import UserError
from uvim_fsq.lm import token_generator
from uvim_fsq.lm.sampling import Sampling
from uvim_fsq.lm.token_generator import COMPILED_CACHE_BLOCK, TokenGenerator


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


@pytest.mark.parametrize("length", [7, 8, 9, 23])
def test_steps_that_read_a_block_of_the_cache_equal_uncached_generation(
    length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As compiled steps do, which here are called without being compiled."""
    options: list[Any] = []
    monkeypatch.setattr(token_generator, "compiled", lambda function, **given: options.append(given) or function)
    monkeypatch.setattr(token_generator, "COMPILED_CACHE_BLOCK", 8)
    lm, batch, seeds = make_lm(length), make_images(2), torch.arange(2)
    generator = TokenGenerator(lm, Sampling(1.0), compile=True)
    assert options == [{"fullgraph": True}]
    spans: list[int | None] = []
    step = lm.decode_step
    monkeypatch.setattr(lm, "decode_step", lambda x, cache, span=None: spans.append(span) or step(x, cache, span))
    assert torch.equal(generator(batch).tokens, generate_without_cache(lm, batch, 1.0, seeds))
    assert spans == [min(-(-(position + 1) // 8) * 8, length) for position in range(length)]


def test_the_default_seed_of_an_image_is_its_place_in_the_batch() -> None:
    generator, batch = TokenGenerator(make_lm(), Sampling(2.0)), make_images()
    tokens = generator(batch).tokens
    assert torch.equal(tokens, generator(batch, torch.arange(5)).tokens)
    assert not torch.equal(tokens, generator(batch, torch.arange(1, 6)).tokens)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_generators_precision_does_not_depend_on_the_autocast_around_it(precision: str) -> None:
    generator, seen = TokenGenerator(make_lm(), precision=precision), []
    create = generator.model.new_cache

    def new_cache(*args: Any, **options: Any) -> Any:
        seen.append((torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()))
        cache = create(*args, **options)
        seen.append(cache.layers[0].own.dtype)
        return cache

    object.__setattr__(generator.model, "new_cache", new_cache)
    low = torch.bfloat16 if precision == "bf16" else torch.float32
    for around in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=around):
            generator(make_images(2))
    assert seen == [(precision == "bf16", False), low] * 2
    kinds = {name: p.dtype for name, p in generator.model.named_parameters()}
    assert kinds["blocks.0.mlp.fc1.weight"] == kinds["blocks.1.self_attn.query.weight"] == low
    assert kinds["encoder.model.blocks.0.attn.qkv.weight"] == low
    for name in ("head.weight", "head.bias", "norm.weight", "token_embedding.weight", "positions", "start"):
        assert kinds[name] == torch.float32
    assert generator.model.encoder.mean.dtype == torch.float32


def test_a_generator_can_be_used_again() -> None:
    lm, first, second = make_lm(), make_images(), make_images().flip(0)
    generator = TokenGenerator(lm)
    for batch in (first, second, first[:2], first):
        assert torch.equal(generator(batch).tokens, generate(lm, batch))
    torch.nn.init.normal_(lm.blocks[0].self_attn.value.weight)
    # The present weights are used, not those at construction.
    assert torch.equal(generator(first).tokens, generate_without_cache(lm, first, 0.0, torch.arange(5)))


def test_bf16_generation_does_not_change_the_model() -> None:
    lm = make_lm()
    generator = TokenGenerator(lm, precision="bf16")
    assert lm.blocks[0].mlp.fc1.weight.dtype == torch.float32
    tokens = generator(make_images()).tokens
    assert tokens.shape == (5, 9) and (tokens == generate(lm, make_images())).float().mean() > 0.6


@pytest.mark.slow
@needs_compiler
def test_a_compiled_step_gives_the_tokens_of_the_eager_one() -> None:
    lm, batch = make_lm(20), make_images()
    generator = TokenGenerator(lm, Sampling(1.0, top_k=5), compile=True)
    assert torch.equal(generator(batch).tokens, generate(lm, batch, temperature=1.0, top_k=5))


def test_compiling_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="compilation needs a C\\+\\+ compiler"):
        TokenGenerator(make_lm(), compile=True)


def test_nothing_is_compiled_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_generator, "compiled", lambda function, **_: pytest.fail("it compiles"))
    assert not TokenGenerator(make_lm()).compiled


def test_8_bits_on_a_gpu_need_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    lm: Any = make_lm()
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    TokenGenerator(lm, int8=True)  # on a CPU
    monkeypatch.setattr(lm, "parameters", lambda: iter([SimpleNamespace(is_cuda=True)]))
    with pytest.raises(UserError, match="compilation needs a C\\+\\+ compiler"):
        TokenGenerator(lm, int8=True)
    TokenGenerator(lm)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0, top_k=5)], ids=["greedy", "random"])
@pytest.mark.parametrize("probabilities", [False, True])
def test_an_exported_loop_gives_the_tokens_of_the_steps(sampling: Sampling, probabilities: bool) -> None:
    class Graph(torch.nn.Module):
        def __init__(self, in_loop: bool) -> None:
            super().__init__()
            self.lm = make_lm(4)
            self.generator = TokenGenerator(self.lm, sampling, int8=probabilities, probabilities=probabilities)
            self.generator.in_loop = in_loop

        def forward(self, images: torch.Tensor, *drawn: torch.Tensor) -> list[torch.Tensor]:
            found = self.generator.predict(images, drawn[0] if drawn else None, 2)
            return [found.tokens, *([] if found.probabilities is None else [found.probabilities])]

    steps, images = Graph(in_loop=False), make_images(2)
    numbers = steps.generator.draw(torch.arange(4))
    inputs = (images,) if numbers is None else (images, numbers)
    with torch.no_grad():
        program = torch.export.export(Graph(in_loop=True), inputs)
        found, expected = program.module()(*inputs), steps(*inputs)
    assert any(node.target is torch.ops.higher_order.while_loop for node in program.graph.nodes)
    assert torch.equal(found[0], expected[0]) and len(found) == 1 + probabilities
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_captured_graph_gives_the_tokens_of_a_cpu(compile: bool, temperature: float) -> None:
    lm, batch = make_lm(COMPILED_CACHE_BLOCK + 5).cuda(), make_images().cuda()
    expected = generate_without_cache(lm.cpu(), batch.cpu(), temperature, torch.arange(5))
    generator = TokenGenerator(lm.cuda(), Sampling(temperature), compile=compile)
    for count in (5, 3, 5):  # the smaller batch is padded
        assert torch.equal(generator(batch[:count]).tokens.cpu(), expected[:count])
    assert len(generator.graphs.graphs) == 1
