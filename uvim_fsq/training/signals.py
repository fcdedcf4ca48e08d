"""SIGINT (Ctrl-C) and SIGTERM (launchers, `timeout`, systemd, Slurm): training ends after a step, all else at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(SystemExit):
    """Training ended early on a signal, after saving; the exit code is 128 + the signal's number."""


class StopSignals:
    """Inside, a signal is noted in `number` and obeyed by whoever looks, except where `at_once` says otherwise.

    A second SIGINT acts at once, unless there is a launcher: there the terminal and the launcher send one each.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._at_once = False
        self._owner = os.getpid()

    def __enter__(self) -> StopSignals:
        self._before = {number: signal.signal(number, self._receive) for number in STOP_SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for number, old in self._before.items():
            signal.signal(number, old)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._owner:
            return  # a loader process that was forked a moment ago
        first = self.number is None
        if first:
            self.number = number
            if self._at_once:
                raise Interrupted(128 + number)
        elif number == signal.SIGINT and "LOCAL_RANK" not in os.environ:
            raise KeyboardInterrupt

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, where nothing can be lost, a signal raises `Interrupted`; also one that came before."""
        self._at_once = True
        try:
            if self.number is not None:
                raise Interrupted(128 + self.number)
            yield
        finally:
            self._at_once = False


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Inside, SIGTERM ends the command as Ctrl-C does: files in the making are removed, exit code 143, one line."""
    owner = os.getpid()

    def end(number: int, _frame: FrameType | None) -> None:
        if os.getpid() != owner:
            os._exit(128 + number)  # a forked process
        signal.signal(number, signal.SIG_IGN)
        print("terminated", file=sys.stderr)
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
