"""CUDA graphs without a GPU: operators are recorded, and repeated on the same memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.support.host_sync import NoHostSync
from uvim_fsq.inference import compiled
from uvim_fsq.lm import captured


class FakeGraph:
    """What torch.cuda.CUDAGraph does: `replay` runs the captured operators again, on the memory of the capture."""

    #: Every graph in the order of creation.
    made: ClassVar[list[FakeGraph]] = []

    def __init__(self) -> None:
        self.operators: list[tuple[Any, Any, Any, Any]] = []
        self.replays = 0
        self.made.append(self)

    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, outputs in self.operators:
            again = tree_leaves(func(*args, **kwargs))
            for old, new in zip(outputs, again, strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class _Recorder(TorchDispatchMode):
    def __init__(self, graph: FakeGraph) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.graph.operators.append((func, args, kwargs or {}, tree_leaves(found)))
        return found


class _Stream:
    def wait_stream(self, other: _Stream) -> None:
        assert isinstance(other, _Stream)


@contextlib.contextmanager
def _capture(graph: FakeGraph, *, stream: _Stream, capture_error_mode: str) -> Iterator[None]:
    assert isinstance(stream, _Stream) and capture_error_mode == "thread_local"
    try:
        with NoHostSync(), _Recorder(graph):
            yield
    except AssertionError as error:
        raise RuntimeError(f"operation not permitted when stream is capturing\n{error}") from error


def use_fake_graphs(monkeypatch: pytest.MonkeyPatch) -> list[FakeGraph]:
    """Lets predictions on a CPU be captured. Returns the list to which every captured graph will be added."""
    FakeGraph.made = []
    for name, value in (
        ("Stream", _Stream),
        ("current_stream", _Stream),
        ("stream", lambda stream: contextlib.nullcontext()),
        ("device", lambda device: contextlib.nullcontext()),
        ("synchronize", lambda: None),
        ("CUDAGraph", FakeGraph),
        ("graph", _capture),
    ):
        monkeypatch.setattr(torch.cuda, name, value)
    for module in (captured, compiled):
        monkeypatch.setattr(module, "captures", lambda device: True)
    return FakeGraph.made
