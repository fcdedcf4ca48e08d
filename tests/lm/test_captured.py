"""Generation as one captured graph: equal tokens, few graphs, and what happens where nothing can be captured."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from tests.support.fake_graphs import FakeGraph, use_fake_graphs
from tests.support.token_models import make_images, make_lm, make_masked_lm
from uvim_fsq.lm.captured import CapturedBatches, captured
from uvim_fsq.lm.masked_generator import MaskedGenerator
from uvim_fsq.lm.sampling import Sampling
from uvim_fsq.lm.token_generator import TokenGenerator

CPU, KIND = torch.device("cpu"), (torch.uint8, torch.Size([3, 2, 2]))


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[FakeGraph]:
    """The graphs that a test captures, on a CPU."""
    return use_fake_graphs(monkeypatch)


def generator_of(kind: str, **options: Any) -> Any:
    steps = 3 if kind == "masked" else None
    sampling = Sampling(options.pop("temperature", 0.0), steps=options.pop("steps", steps))
    return (
        TokenGenerator(make_lm(), sampling, **options)
        if kind == "autoregressive"
        else MaskedGenerator(make_masked_lm(), sampling, **options)
    )


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("autoregressive", {"probabilities": True}),
        ("autoregressive", {"temperature": 1.0}),
        ("autoregressive", {"int8": True, "temperature": 0.7}),
        ("autoregressive", {"precision": "bf16"}),
        ("masked", {"probabilities": True}),
        ("masked", {"temperature": 1.0}),
        ("masked", {"steps": 1}),
        ("masked", {"precision": "bf16"}),
    ],
)
def test_replayed_generation_equals_the_plain_one(
    kind: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, replayed = generator_of(kind, **options), generator_of(kind, **options)
    first, seeds = make_images(), torch.tensor([3, 1, 4, 1, 5])
    batches = [(first, seeds), (first.flip(0), seeds + 1), (first[:3], seeds[:3]), (first, seeds)]
    expected = [plain(*batch) for batch in batches]
    graphs = use_fake_graphs(monkeypatch)
    found = [replayed(*batch) for batch in batches]
    for one, two in zip(found, expected, strict=True):
        assert torch.equal(one.tokens, two.tokens)
        torch.testing.assert_close(one.features, two.features)
        torch.testing.assert_close(one.probabilities, two.probabilities)
    (graph,) = graphs  # the smaller batch is padded
    assert graph.replays == 4
    assert len({str(x.tokens.tolist()) for x in found[:3]}) == 3  # else the images would not matter


def test_a_graph_uses_the_present_weights(graphs: list[FakeGraph]) -> None:
    generator, batch = generator_of("autoregressive"), make_images()
    before = generator(batch).tokens
    torch.nn.init.normal_(generator.model.blocks[0].self_attn.query.weight)
    torch.nn.init.normal_(generator.model.head.weight)
    after, (graph,) = generator(batch).tokens, graphs
    assert not torch.equal(before, after)  # and they are no view of the graph's memory
    assert torch.equal(after, TokenGenerator(generator.model)(batch).tokens) and graph.replays == 2


def test_samples_have_a_graph_of_their_own(graphs: list[FakeGraph]) -> None:
    generator, batch, seeds = generator_of("autoregressive", temperature=1.0), make_images(2), torch.arange(6)
    found = generator.samples(batch, seeds, 3)
    assert torch.equal(found.tokens, generator.predict(batch, generator.draw(seeds), 3).tokens)
    assert found.features.shape[0] == 6 and len(graphs) == 1
    assert torch.equal(generator(batch, torch.arange(2)).tokens, found.tokens[:2]) and len(graphs) == 2


def test_images_of_another_type_have_a_graph_of_their_own(graphs: list[FakeGraph]) -> None:
    generator, batch = generator_of("masked"), make_images()
    expected = generator(batch).tokens
    assert torch.equal(generator((batch.float() / 127.5 - 1)[:4]).tokens, expected[:4]) and len(graphs) == 2


@pytest.mark.parametrize("kind", ["autoregressive", "masked"])
def test_a_generator_is_freed_without_garbage_collection(kind: str, graphs: list[FakeGraph]) -> None:
    """Its graphs hold gigabytes; they cannot wait until Python looks for reference cycles."""
    generator = generator_of(kind)
    generator(make_images())
    reference = weakref.ref(generator)
    graphs.clear()
    del generator
    assert reference() is None


def test_a_new_batch_size_replaces_graphs_of_similar_sizes() -> None:
    """A batch is padded to the size of another one: at most 4 times its own, or any if steps are compiled."""
    batches = CapturedBatches()
    for size, held, expected, left in (
        (8, [], 8, []),
        (8, [8], 8, [8]),
        (3, [8, 9], 8, [8, 9]),
        (2, [8], 8, [8]),
        (1, [8], 1, [8]),
        (2, [9], 2, [9]),
        (9, [8, 2, 40], 9, [2, 40]),
        (33, [8], 33, [8]),
        (32, [8], 32, []),
    ):
        batches.graphs = {(one, 1, KIND): list for one in held}
        found, _ = batches.padded(size, 1, KIND)
        if found not in held:
            batches._make_room((found, 1, KIND))
        assert found == expected and [key[0] for key in batches.graphs] == left
    batches = CapturedBatches(any_padding=True)
    batches.graphs = {(40, 1, KIND): list, (2, 25, KIND): list, (2, 4, KIND): list, (30, 1, "others"): list}
    assert batches.padded(1, 1, KIND) == (40, 1) and batches.padded(41, 1, KIND) == (41, 1)
    assert batches.padded(2, 4, KIND) == (2, 4) and batches.padded(2, 5, KIND) == (2, 25)
    assert batches.padded(1, 3, KIND) == (1, 3) and batches.padded(2, 2, "others") == (2, 2)
    batches._make_room((26, 1, KIND))
    assert list(batches.graphs) == [(2, 25, KIND), (2, 4, KIND), (30, 1, "others")]
    batches._make_room((2, 8, KIND))  # 16 rows replace 50 and 8
    assert list(batches.graphs) == [(30, 1, "others")]


def test_fewer_samples_use_the_graph_of_more(graphs: list[FakeGraph]) -> None:
    generator, batch, seeds = generator_of("autoregressive", temperature=1.0), make_images(2), torch.arange(8)
    whole = generator.samples(batch, seeds, 4)
    fewer = generator.samples(batch, seeds[:6], 3)
    assert len(graphs) == 1 and torch.equal(fewer.tokens, whole.tokens[:6]) and fewer.features.shape[0] == 6


@pytest.mark.parametrize("kind", ["autoregressive", "masked"])
def test_a_generator_that_cannot_be_captured_says_so_once(
    kind: str, graphs: list[FakeGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then batches are not padded, and nothing is kept that would delay freeing it."""
    generator, batch = generator_of(kind, temperature=1.0), make_images()
    generator(batch[:1])  # is captured, but what comes then is not
    expected = generator.predict(batch[:3], generator.draw(torch.arange(3))).tokens
    encode, sizes = generator.model.encode, []

    def reads(images: torch.Tensor) -> torch.Tensor:
        sizes.append(len(images))
        return encode(images) * bool(images.sum() > 0)

    object.__setattr__(generator.model, "encode", reads)
    with pytest.warns(UserWarning, match="cannot be captured") as seen:
        generator(batch)
        assert not generator.graphs.graphs  # they would keep their memory
        assert torch.equal(generator(batch[:3]).tokens, expected)
    assert len(seen) == 1 and sizes == [5, 5, 5, 3] and not generator.graphs.graphs
    reference = weakref.ref(generator)
    graphs.clear()
    del generator, reads
    assert reference() is None


def test_one_line_says_what_cannot_be_captured(graphs: list[FakeGraph]) -> None:
    def waits(inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [inputs[0] + int(inputs[0].sum())]

    x = torch.arange(3)
    with pytest.warns(
        UserWarning, match=r"captured as a CUDA graph \(operation not permitted when .*one by one"
    ) as seen:
        assert captured(waits, [x], CPU) is None
    assert len(seen) == 1 and "\n" not in str(seen[0].message)


def test_lack_of_memory_and_faults_of_an_operator_are_raised(
    graphs: list[FakeGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_large(inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        raise torch.OutOfMemoryError("20 GiB")

    with pytest.raises(torch.OutOfMemoryError):
        captured(too_large, [], CPU)

    def fault() -> None:
        raise RuntimeError("device-side assert")

    monkeypatch.setattr(torch.cuda, "synchronize", fault)
    with pytest.raises(RuntimeError, match="device-side"):
        captured(lambda inputs: [inputs[0] @ inputs[0]], [torch.ones(2, 3)], CPU)


def test_capturing_warms_up_on_another_stream(graphs: list[FakeGraph], monkeypatch: pytest.MonkeyPatch) -> None:
    """What an operator sets up when it is first called is not allowed during a capture."""
    events: list[Any] = []
    aside: list[Any] = []

    class Stream:
        def __init__(self, name: str = "aside") -> None:
            self.name = name
            aside.extend([self] * (name == "aside"))

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
    captured(lambda inputs: events.append("call") or inputs, [torch.ones(1)], CPU)
    assert events == [
        ("aside", "waits for", "current"),
        ("enter", "aside", {}),
        "call",
        "leave",
        ("current", "waits for", "aside"),
        ("enter", "graph", {"stream": aside[-1], "capture_error_mode": "thread_local"}),
        "call",
        "leave",
    ]
