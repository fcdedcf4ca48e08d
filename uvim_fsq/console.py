"""Progress output: permanent lines on standard output, and a progress bar with the time left on standard error.

Only the first of several processes prints. Bars are redrawn without a thread, because loaders fork processes.
"""

from __future__ import annotations

import os
import sys
import time

#: Seconds between progress lines (no terminal), and between two redraws of a bar (terminal).
LINES, REDRAW = 15.0, 0.1
WIDTH = 20


def is_first() -> bool:
    """Whether this is the process that prints. Like `processes.is_main`, but needs neither torch nor a group."""
    return os.environ.get("RANK", "0") == "0"


def on_terminal() -> bool:
    """Whether a bar can be redrawn in place."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    seconds = int(seconds)
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def printable(text: str) -> str:
    """The text without line ends and control characters, which could disturb a terminal."""
    return "".join(char if char.isprintable() else "?" for char in text)


def clear() -> None:
    """Erases the bar on the terminal, so that something else can be printed there."""
    if is_first() and on_terminal():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def say(text: str) -> None:
    """Prints a permanent line on standard output."""
    if is_first():
        clear()
        print(text, flush=True)


class Bar:
    """A progress bar with the time left: one redrawn line of standard error on a terminal, otherwise a plain line now
    and then.

    Args:
        total: items in all; 0 while unknown, `update` can set it later.
        start: items that an earlier run has done already; not counted in the speed.
        every: seconds between plain lines.
    """

    def __init__(self, title: str, total: int = 0, start: int = 0, every: float = LINES) -> None:
        self.title, self.total, self.start, self.every = printable(title), total, start, every
        self.shown = is_first()
        self.begin = self.last = time.monotonic()

    def update(self, done: int, total: int | None = None) -> None:
        """Reports that `done` of `total` items are done. Cheap enough to call for every item."""
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
        """The time left at the average speed so far, as h:mm:ss; "?" while unknown."""
        ahead = done - self.start
        return clock((self.total - done) * (time.monotonic() - self.begin) / ahead) if ahead > 0 else "?"

    def wait(self) -> None:
        """Delays the next progress line, because something else was just printed."""
        self.last = time.monotonic()

    def pause(self, seconds: float) -> None:
        """Excludes `seconds` of waiting from the measured speed."""
        self.begin += seconds

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self.shown:
            clear()
