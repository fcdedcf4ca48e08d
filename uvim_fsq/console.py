"""What a user sees while something goes on: lines that stay, and a bar with the time left. Knows nothing of the work.

Only the first of several processes shows anything. No thread redraws: processes are forked meanwhile.
"""

from __future__ import annotations

import os
import sys
import time

#: Seconds between the lines that stay, and between two drawings of a bar.
LINES, REDRAW = 15.0, 0.1
WIDTH = 20


def is_first() -> bool:
    """Whether this is the process that speaks. As `processes.is_main`, but known before torch is imported."""
    return os.environ.get("RANK", "0") == "0"


def on_terminal() -> bool:
    """Whether a bar can be redrawn in place."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    seconds = int(seconds)
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def clear() -> None:
    """Wipes a bar off the terminal, so that something else may be printed there."""
    if is_first() and on_terminal():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def say(text: str) -> None:
    """A line that stays, on standard output."""
    if is_first():
        clear()
        print(text, flush=True)


class Bar:
    """How far a job is, and when it will end: on a terminal one line of standard error, redrawn until the end;
    elsewhere a plain line now and then.

    `total` may be told later, by `update`; `start` is what an earlier run had done; `every`: seconds between lines.
    """

    def __init__(self, title: str, total: int = 0, start: int = 0, every: float = LINES) -> None:
        self.title, self.total, self.start, self.every = title, total, start, every
        self.shown = is_first()
        self.begin = self.last = time.monotonic()

    def update(self, done: int, total: int | None = None) -> None:
        """Says that `done` of `total` are done. Costs nothing most of the time."""
        self.total = self.total if total is None else total
        now = time.monotonic()
        terminal = self.shown and on_terminal()
        if not self.shown or now - self.last < (REDRAW if terminal else self.every):
            return
        self.last = now
        if terminal:
            width = os.get_terminal_size(sys.stderr.fileno()).columns - 1
            print(f"\r{self._text(done, bar=True)[:width]}\x1b[K", end="", file=sys.stderr, flush=True)
        else:
            print(self._text(done, bar=False), file=sys.stderr, flush=True)

    def _text(self, done: int, *, bar: bool) -> str:
        if not self.total:
            return f"{self.title} {done}"
        drawn = f"[{'#' * (WIDTH * done // self.total):{WIDTH}}] " if bar else ""
        return f"{self.title} {drawn}{done}/{self.total}  eta {self.eta(done)}"

    def eta(self, done: int) -> str:
        """The time left if the rest goes as what was done."""
        ahead = done - self.start
        return clock((self.total - done) * (time.monotonic() - self.begin) / ahead) if ahead > 0 else "?"

    def wait(self) -> None:
        """Something else was said just now: the next line has time."""
        self.last = time.monotonic()

    def pause(self, seconds: float) -> None:
        """Takes out time in which the job stood still."""
        self.begin += seconds

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self.shown:
            clear()
