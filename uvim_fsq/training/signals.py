"""Handling of SIGINT (Ctrl-C) and SIGTERM (launchers, `timeout`, systemd, Slurm).

Training stops after the current step; everything else stops immediately.
"""

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
    """Training was stopped by a signal, after saving. The exit code is 128 + the signal number."""


class StopSignals:
    """A context in which a signal is only recorded in `number`, for the training loop to check.

    Inside `at_once`, a signal raises immediately. So does a second SIGINT, except under a launcher, because there the
    terminal and the launcher each send one.
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
            return  # a loader process that was just forked
        first = self.number is None
        if first:
            self.number = number
            if self._at_once:
                raise Interrupted(128 + number)
        elif number == signal.SIGINT and "LOCAL_RANK" not in os.environ:
            raise KeyboardInterrupt

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """A context in which nothing can be lost: a signal, including an earlier one, raises `Interrupted`."""
        self._at_once = True
        try:
            if self.number is not None:
                raise Interrupted(128 + self.number)
            yield
        finally:
            self._at_once = False


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """A context in which SIGTERM ends the command like Ctrl-C, with cleanup, one line of output and exit code 143."""
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
