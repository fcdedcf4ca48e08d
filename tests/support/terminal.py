"""A clock moved by hand, and what a terminal was sent."""

from __future__ import annotations

import os

import pytest


class Clock:
    """Replaces time.monotonic and time.perf_counter; tests move `now`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        for name in ("monotonic", "perf_counter"):
            monkeypatch.setattr(f"time.{name}", lambda: self.now)


def everything(terminal: int) -> str:
    """Everything written to a terminal until its other end is closed."""
    raw = b""
    try:
        while piece := os.read(terminal, 65536):
            raw += piece
    except OSError:
        pass  # Linux raises it when no process can write any more
    return raw.decode()
