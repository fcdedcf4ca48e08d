"""The decoder's parts by hand: settings, batch sizes and buffers, captured steps, random numbers, sampling."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.test_lm import images, make_lm
from uvim_fsq.errors import UserError
from uvim_fsq.lm import token_generator as generate
from uvim_fsq.lm.sampling import Sampling, example_uniforms, sample
from uvim_fsq.lm.token_generator import CACHE_BLOCK, COMPILED_CACHE_BLOCK, TokenGenerator

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_settings_at_their_limits() -> None:
    goods: list[dict[str, Any]] = [
        {"top_k": 1},
        {"top_p": 1.0},
        {"top_p": 1e-9},
        {"temperature": 0.0},
        {"temperature": 9.0},
    ]
    for good in goods:
        Sampling(**{"temperature": 1.0, **good})
    assert (Sampling().temperature, Sampling().top_k, Sampling().top_p) == (0, None, None)
    mistakes: list[tuple[dict[str, Any], str]] = [
        ({"temperature": -1e-9}, "temperature=-1e-09 is negative; 0 is greedy"),
        ({"top_k": 1, "top_p": 1.0}, "top_k and top_p are mutually exclusive"),
        ({"top_k": 0}, "top_k=0: keep at least one token"),
        ({"top_p": 0.0}, "top_p=0.0: must be above 0 and at most 1"),
        ({"top_p": 1.001}, "top_p=1.001: must be above 0"),
    ]
    for bad, message in mistakes:
        with pytest.raises(UserError, match=message):
            Sampling(**bad)


def test_each_example_has_a_stream_of_its_own() -> None:
    seeds = torch.tensor([5, 2**40, 5])
    found = example_uniforms(seeds, 7)
    assert found.dtype == torch.float64 and found.shape == (3, 7)
    expected = torch.rand(7, generator=torch.Generator().manual_seed(2**40), dtype=torch.float64)
    assert torch.equal(found[1], expected) and torch.equal(found[0], found[2]) and not torch.equal(found[0], found[1])


def test_without_seeds_an_image_is_drawn_by_its_place() -> None:
    decoder, batch = TokenGenerator(make_lm(), Sampling(2.0)), images()
    tokens = decoder(batch)
    assert torch.equal(tokens, decoder(batch, torch.arange(5)))
    assert not torch.equal(tokens, decoder(batch, torch.arange(1, 6)))


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
def test_where_the_draws_change(top_k: int | None, top_p: float | None, kept: list[float]) -> None:
    """The inverse of the distribution that is left, in the vocabulary's order."""
    logits = torch.tensor([0.1, 0.4, 0.3, 0.2]).log()[None] + 3
    ends = torch.tensor(kept, dtype=torch.float64).cumsum(0)
    for token, share in enumerate(kept):
        if share:
            for u in (ends[token] - share + 1e-6, ends[token] - 1e-6):
                assert int(sample(logits, u.view(1, 1), top_k, top_p)) == token
    assert sample(logits.expand(3, -1), torch.rand(3, 1, dtype=torch.float64), top_k, top_p).shape == (3, 1)


def test_a_token_without_probability_is_never_drawn() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]])
    drawn = [int(sample(logits, torch.tensor([[u]], dtype=torch.float64), None, None)) for u in (0, 0.4999, 0.5, 1)]
    assert drawn[:3] == [1, 1, 3]
    assert int(sample(torch.tensor([[0.0, 0.0]]), torch.zeros(1, 1, dtype=torch.float64), 1, None)) == 0  # a tie


def test_equal_batches_share_buffers_and_a_new_size_drops_those_it_replaces() -> None:
    """On a GPU a batch is filled up to a size that is there, at most 4 times itself, or any where that is compiled."""
    decoder = TokenGenerator(make_lm())
    have: dict[int, Any] = decoder._buffers
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
        assert decoder._size(size, device) == expected and list(have) == left
    decoder.compiled = True
    have.clear()
    have.update({40: None})
    assert decoder._size(1, GPU) == 40 and list(have) == [40]
    assert decoder._size(41, GPU) == 41 and not have


def test_a_batch_that_is_filled_up_gives_its_own_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, batch, seeds = TokenGenerator(make_lm(), Sampling(1.0)), images(), torch.tensor([3, 1, 4, 1, 5])
    plain = decoder(batch, seeds)
    monkeypatch.setattr(decoder, "_size", lambda count, device: 8)
    filled = decoder(batch, seeds)
    assert torch.equal(filled, plain) and set(decoder._buffers) == {5, 8}
    assert decoder._buffers[8].tokens.shape == (8, 9)
    before = filled.clone()
    decoder(batch.flip(0), seeds)
    assert torch.equal(filled, before)  # no view of the buffers


@pytest.mark.parametrize("compile", [False, True])
def test_steps_read_as_much_of_the_cache_as_is_filled(compile: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    options: list[Any] = []
    monkeypatch.setattr(generate, "compiled", lambda function, **given: options.append(given) or function)
    length, span = (150, CACHE_BLOCK) if not compile else (COMPILED_CACHE_BLOCK + 2, COMPILED_CACHE_BLOCK)
    decoder = TokenGenerator(make_lm(length), compile=compile)
    assert (decoder.span, options) == (span, [{"fullgraph": True}] * compile)
    spans: list[int] = []
    monkeypatch.setattr(decoder, "_step", lambda buffers, span: spans.append(span))
    decoder(images(2))
    ends = [span] * span + [min(2 * span, length)] * (min(2 * span, length) - span) + [length] * (length - 2 * span)
    assert spans == ends


def test_captured_steps_are_replayed() -> None:
    decoder, batch = TokenGenerator(make_lm(CACHE_BLOCK + 3), Sampling(1.0)), images(2)
    plain, replayed = decoder(batch), []
    (buffers,) = decoder._buffers.values()

    class Graph:
        def replay(self) -> None:
            replayed.append(1)
            decoder._step(buffers, CACHE_BLOCK)

    buffers.graphs[CACHE_BLOCK] = Graph()  # the other span has none
    assert torch.equal(decoder(batch), plain) and len(replayed) == CACHE_BLOCK


def test_capturing_warms_up_and_leaves_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine without a GPU: two steps aside, one inside the graph, each from the first position."""
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
    decoder = TokenGenerator(make_lm())
    decoder(images(2))
    (buffers,) = decoder._buffers.values()
    step = decoder._step

    def recorded(buffers: Any, span: int) -> None:
        events.append(("step", span, int(buffers.cache.position)))
        step(buffers, span)

    monkeypatch.setattr(decoder, "_step", recorded)
    with torch.inference_mode():
        buffers.cache.position.zero_()
        decoder._capture(buffers, 9)
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
def test_the_arithmetic_is_the_decoders_whatever_is_around_it(precision: str) -> None:
    decoder = TokenGenerator(make_lm(), precision=precision)
    for around in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=around), decoder._decoding_context(CPU):
            assert torch.is_autocast_enabled("cpu") == (precision == "bf16")
            assert not torch.is_autocast_cache_enabled()
    kinds = {name: p.dtype for name, p in decoder.model.named_parameters()}
    low = torch.bfloat16 if precision == "bf16" else torch.float32
    assert kinds["blocks.0.mlp.fc1.weight"] == kinds["blocks.1.self_attn.query.weight"] == low
    assert kinds["encoder.blocks.0.attn.qkv.weight"] == low
    for name in ("head.weight", "head.bias", "norm.weight", "token_embedding.weight", "positions", "start"):
        assert kinds[name] == torch.float32
    assert decoder.model.mean.dtype == torch.float32
    decoder(images(2))
    (buffers,) = decoder._buffers.values()
    assert buffers.cache.layers[0].own.dtype == low and buffers.uniforms.dtype == torch.float64
