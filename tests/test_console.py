"""Progress bars on terminals, lines in log files; only the main process writes."""

from __future__ import annotations

import os
import pty
import sys

import pytest

from tests.support.terminal import Clock, everything
from uvim_fsq import console as progress
from uvim_fsq.console import Bar, say
from uvim_fsq.console import clock as clock_text


def test_a_log_file_gets_a_line_every_fifteen_seconds(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Bar("reading") as bar:
        for second in range(1, 61):
            clock.now += 1
            bar.update(second, 120)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "reading 15/120  eta 0:01:45",
        "reading 30/120  eta 0:01:30",
        "reading 45/120  eta 0:01:15",
        "reading 60/120  eta 0:01:00",
    ]


def test_the_time_left_counts_neither_earlier_work_nor_pauses(clock: Clock) -> None:
    bar = Bar("oracle", 1000, start=500)
    assert bar.eta(500) == "?"
    clock.now += 100
    bar.pause(50)
    assert bar.eta(600) == "0:03:20" == clock_text(200)
    assert clock_text(36061) == "10:01:01"


def test_without_a_total_there_is_no_bar(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    bar = Bar("reading")
    clock.now += 20
    bar.update(7)
    assert capsys.readouterr().err == "reading 7\n"


def test_other_processes_are_silent(
    clock: Clock, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    with Bar("reading", 10) as bar:
        clock.now += 100
        bar.update(5)
        say("done")
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_a_terminal_gets_a_bar_that_is_wiped(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    main_end, end = pty.openpty()
    monkeypatch.setenv("TERM", "xterm")
    with os.fdopen(end, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setattr(os, "get_terminal_size", lambda *_: os.terminal_size((40, 10)))
        with Bar("reading", 10) as bar:
            clock.now += progress.REDRAW
            bar.update(5)
            bar.update(6)  # too soon
            clock.now += progress.REDRAW
            bar.update(10)
        monkeypatch.setenv("TERM", "dumb")
        assert not progress.on_terminal()
    drawn = everything(main_end)
    wipe = "\x1b[K"
    assert drawn == (
        f"\rreading [##########          ] 5/10  et{wipe}\rreading [####################] 10/10  e{wipe}\r{wipe}"
    )


def test_names_in_titles_cannot_disturb_the_terminal(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    bar = Bar("predicting a\n\x1b[2Jb.mp4")
    clock.now += 20
    bar.update(7)
    assert capsys.readouterr().err == "predicting a??[2Jb.mp4 7\n"
