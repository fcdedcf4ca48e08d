"""Stands in for a kill at a chosen call."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest


class Killed(BaseException):
    """Stands in for a kill: nothing catches it."""


@contextlib.contextmanager
def killing(place: Any, name: str, when: str, countdown: int) -> Iterator[list[int]]:
    """Raises `Killed` before or after the call of `place.name` number `countdown`."""
    original: Callable[..., Any] = getattr(place, name)
    calls: list[int] = []

    def call(*arguments: Any, **named: Any) -> Any:
        # A folder that is not there is not deleted.
        if name != "rmtree" or arguments[0].exists():
            calls.append(1)
        if when == "before" and len(calls) == countdown:
            raise Killed
        result = original(*arguments, **named)
        if when == "after" and len(calls) == countdown:
            raise Killed
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place, name, call)
        yield calls
