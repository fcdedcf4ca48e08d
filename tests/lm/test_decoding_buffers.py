"""TokenGenerator: buffers of several batch sizes, captured steps, precision."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.support.token_models import make_images, make_lm
from uvim_fsq.lm import token_generator
from uvim_fsq.lm.sampling import Sampling
from uvim_fsq.lm.token_generator import CACHE_BLOCK, COMPILED_CACHE_BLOCK, BufferPool, TokenGenerator

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def _buffers_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TokenGenerator, "_is_static", lambda self, device: True)


def test_the_default_seed_of_an_image_is_its_place_in_the_batch() -> None:
    generator, batch = TokenGenerator(make_lm(), Sampling(2.0)), make_images()
    tokens = generator(batch).tokens
    assert torch.equal(tokens, generator(batch, torch.arange(5)).tokens)
    assert not torch.equal(tokens, generator(batch, torch.arange(1, 6)).tokens)


def test_a_new_batch_size_replaces_buffers_of_similar_sizes() -> None:
    """On a GPU a batch is padded to an existing size: at most 4 times its own, or any if steps are compiled."""
    pool = BufferPool(compiled=False)
    have: dict[int, Any] = pool.by_size
    for size, device, held, expected, left in (
        (8, GPU, [], 8, []),
        (8, GPU, [8], 8, [8]),
        (3, GPU, [8, 9], 8, [8, 9]),
        (2, GPU, [8], 8, [8]),
        (1, GPU, [8], 1, [8]),
        (2, GPU, [9], 2, [9]),
        (2, CPU, [8], 2, []),
        (9, GPU, [8, 2, 40], 9, [2, 40]),
        (33, GPU, [8], 33, [8]),
        (32, GPU, [8], 32, []),
    ):
        have.clear()
        have.update(dict.fromkeys(held))
        assert pool.batch_size(size, device) == expected and list(have) == left
    pool.compiled = True
    have.clear()
    have.update({40: None})
    assert pool.batch_size(1, GPU) == 40 and list(have) == [40]
    assert pool.batch_size(41, GPU) == 41 and not have


def test_a_padded_batch_gives_its_own_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    generator, batch, seeds = TokenGenerator(make_lm(), Sampling(1.0)), make_images(), torch.tensor([3, 1, 4, 1, 5])
    expected = generator(batch, seeds).tokens
    monkeypatch.setattr(generator._pool, "batch_size", lambda count, device: 8)
    padded = generator(batch, seeds).tokens
    assert torch.equal(padded, expected) and set(generator._pool.by_size) == {5, 8}
    assert generator._pool.by_size[8].tokens.shape == (8, 9)
    before = padded.clone()
    generator(batch.flip(0), seeds)
    assert torch.equal(padded, before)  # the tokens are no view of the buffers


@pytest.mark.parametrize("compile", [False, True])
def test_steps_read_as_much_of_the_cache_as_is_filled(compile: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    options: list[Any] = []
    monkeypatch.setattr(token_generator, "compiled", lambda function, **given: options.append(given) or function)
    length, span = (150, CACHE_BLOCK) if not compile else (COMPILED_CACHE_BLOCK + 2, COMPILED_CACHE_BLOCK)
    generator = TokenGenerator(make_lm(length), compile=compile)
    assert (generator.span, options) == (span, [{"fullgraph": True}] * compile)
    spans: list[int] = []
    monkeypatch.setattr(generator, "_step", lambda buffers, span: spans.append(span))
    generator(make_images(2))
    expected = [span] * span + [min(2 * span, length)] * (min(2 * span, length) - span) + [length] * (length - 2 * span)
    assert spans == expected


def test_captured_steps_are_replayed() -> None:
    generator, batch = TokenGenerator(make_lm(CACHE_BLOCK + 3), Sampling(1.0)), make_images(2)
    expected, replayed = generator(batch).tokens, []
    (buffers,) = generator._pool.by_size.values()

    class Graph:
        def replay(self) -> None:
            replayed.append(1)
            generator._step(buffers, CACHE_BLOCK)

    buffers.graphs[CACHE_BLOCK] = Graph()  # the other span has none
    assert torch.equal(generator(batch).tokens, expected) and len(replayed) == CACHE_BLOCK


def test_capturing_warms_up_and_resets_the_position(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps on another stream, one inside the graph, each from the first position; here without a GPU."""
    events: list[Any] = []

    class Stream:
        def __init__(self, name: str = "aside") -> None:
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            events.append((self.name, "waits for", other.name))

    @contextlib.contextmanager
    def inside(what: Any, **keys: Any) -> Iterator[None]:
        events.append(("enter", getattr(what, "name", what), keys))
        yield
        events.append("leave")

    for name, value in (
        ("Stream", Stream),
        ("current_stream", lambda: Stream("current")),
        ("stream", inside),
        ("CUDAGraph", lambda: "graph"),
        ("graph", inside),
    ):
        monkeypatch.setattr(torch.cuda, name, value)
    generator = TokenGenerator(make_lm())
    generator(make_images(2))
    (buffers,) = generator._pool.by_size.values()
    step = generator._step

    def recorded(buffers: Any, span: int) -> None:
        events.append(("step", span, int(buffers.cache.position)))
        step(buffers, span)

    monkeypatch.setattr(generator, "_step", recorded)
    with torch.inference_mode():
        buffers.cache.position.zero_()
        generator._capture(buffers, 9)
    assert events == [
        ("aside", "waits for", "current"),
        ("enter", "aside", {}),
        ("step", 9, 0),
        ("step", 9, 0),
        "leave",
        ("current", "waits for", "aside"),
        ("enter", "graph", {"capture_error_mode": "thread_local"}),
        ("step", 9, 0),
        "leave",
    ]
    assert int(buffers.cache.position) == 0 and buffers.graphs == {9: "graph"}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_generators_precision_does_not_depend_on_the_autocast_around_it(precision: str) -> None:
    generator = TokenGenerator(make_lm(), precision=precision)
    for around in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=around), generator._decoding_context(CPU):
            assert torch.is_autocast_enabled("cpu") == (precision == "bf16")
            assert not torch.is_autocast_cache_enabled()
    kinds = {name: p.dtype for name, p in generator.model.named_parameters()}
    low = torch.bfloat16 if precision == "bf16" else torch.float32
    assert kinds["blocks.0.mlp.fc1.weight"] == kinds["blocks.1.self_attn.query.weight"] == low
    assert kinds["encoder.model.blocks.0.attn.qkv.weight"] == low
    for name in ("head.weight", "head.bias", "norm.weight", "token_embedding.weight", "positions", "start"):
        assert kinds[name] == torch.float32
    assert generator.model.encoder.mean.dtype == torch.float32
    generator(make_images(2))
    (buffers,) = generator._pool.by_size.values()
    assert buffers.cache.layers[0].own.dtype == low and buffers.uniforms.dtype == torch.float64
