"""What a user sees meanwhile: bars on terminals, lines in log files, what comes next; one process speaks."""

from __future__ import annotations

import json
import os
import pty
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from uvim_fsq import console as progress
from uvim_fsq.console import Bar, clock, say
from uvim_fsq.training.progress import Progress


class Clock:
    """time.monotonic and time.perf_counter by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        for name in ("monotonic", "perf_counter"):
            monkeypatch.setattr(f"time.{name}", lambda: self.now)


def everything(terminal: int) -> str:
    """What was written to a terminal whose other end is closed or will be."""
    raw = b""
    try:
        while piece := os.read(terminal, 65536):
            raw += piece
    except OSError:
        pass  # how Linux says that nobody can write any more
    return raw.decode()


@pytest.fixture
def hands(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    monkeypatch.delenv("RANK", raising=False)
    yield Clock(monkeypatch)


def test_a_log_file_gets_a_line_now_and_then(hands: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Bar("reading") as bar:
        for second in range(1, 61):
            hands.now += 1
            bar.update(second, 120)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "reading 15/120  eta 0:01:45",
        "reading 30/120  eta 0:01:30",
        "reading 45/120  eta 0:01:15",
        "reading 60/120  eta 0:01:00",
    ]


def test_the_time_left_counts_neither_earlier_work_nor_pauses(hands: Clock) -> None:
    bar = Bar("oracle", 1000, start=500)
    assert bar.eta(500) == "?"
    hands.now += 100
    bar.pause(50)
    assert bar.eta(600) == "0:03:20" == clock(200)
    assert clock(36061) == "10:01:01"


def test_nothing_is_drawn_without_a_total(hands: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    bar = Bar("reading")
    hands.now += 20
    bar.update(7)
    assert capsys.readouterr().err == "reading 7\n"


def test_other_processes_are_silent(
    hands: Clock, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    with Bar("reading", 10) as bar:
        hands.now += 100
        bar.update(5)
        say("done")
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_a_terminal_gets_a_bar_that_is_wiped(hands: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    main_end, end = pty.openpty()
    monkeypatch.setenv("TERM", "xterm")
    with os.fdopen(end, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setattr(os, "get_terminal_size", lambda *_: os.terminal_size((40, 10)))
        with Bar("reading", 10) as bar:
            hands.now += progress.REDRAW
            bar.update(5)
            bar.update(6)  # too soon
            hands.now += progress.REDRAW
            bar.update(10)
        monkeypatch.setenv("TERM", "dumb")
        assert not progress.on_terminal()
    drawn = everything(main_end)
    wipe = "\x1b[K"
    assert drawn == (
        f"\rreading [##########          ] 5/10  et{wipe}\rreading [####################] 10/10  e{wipe}\r{wipe}"
    )


def test_training_says_a_line_now_and_then(tmp_path: Path, hands: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    from uvim_fsq.config.schema import TrainConfig

    shown = Progress(TrainConfig(out=str(tmp_path), batch_size=8), "oracle", 100, 0, main=True)
    for step in range(1, 101):
        hands.now += 1
        shown.stepped(step)
        shown.log(step, {"loss": 1 / step})
    shown.evaluated(100, {"rmse": 0.5}, None, 3.0)
    shown.close()
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert [int(line.split("/")[0].split()[-1]) for line in lines] == [1, 16, 31, 46, 61, 76, 91, 100, 100]
    assert lines[1] == "oracle 16/100  eta 0:01:24  8 images/s  loss 0.0625  data 0%"
    assert lines[-1] == "oracle 100/100  evaluation: rmse 0.5"
    # The bar has nothing to add where a line has just been said.
    assert captured.err == ""
    metrics = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == [*range(1, 101), 100]


def test_a_step_that_takes_minutes_is_not_silent(
    tmp_path: Path, hands: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    from uvim_fsq.config.schema import TrainConfig

    shown = Progress(TrainConfig(out=str(tmp_path)), "lm", 50, 10, main=True)
    for step in range(11, 14):
        hands.now += 60
        shown.stepped(step)
    shown.close()
    assert capsys.readouterr().err.splitlines() == [
        "lm 11/50  eta 0:39:00",
        "lm 12/50  eta 0:38:00",
        "lm 13/50  eta 0:37:00",
    ]
