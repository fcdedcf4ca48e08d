"""Progress lines of training, and its log file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.runs import CHANGED, fit_run
from tests.support.small import oracle_run
from tests.support.terminal import Clock
from uvim_fsq.errors import UserError
from uvim_fsq.files import read_json_lines
from uvim_fsq.training.progress import Progress


def test_training_prints_a_line_every_fifteen_seconds(
    tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    from uvim_fsq.config.schema import TrainConfig

    shown = Progress(TrainConfig(out=str(tmp_path), batch_size=8), "oracle", 100, 0, main=True)
    for step in range(1, 101):
        clock.now += 1
        shown.stepped(step)
        shown.log(step, {"loss": 1 / step})
    shown.evaluated(100, {"rmse": 0.5}, None, 3.0)
    shown.close()
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert [int(line.split("/")[0].split()[-1]) for line in lines] == [1, 16, 31, 46, 61, 76, 91, 100, 100]
    assert lines[1] == "oracle 16/100  eta 0:01:24  8 images/s  loss 0.0625  data 0%"
    assert lines[-1] == "oracle 100/100  evaluation: rmse 0.5"
    # The bar is silent where a line has just been printed.
    assert captured.err == ""
    metrics = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == [*range(1, 101), 100]


def test_slow_steps_are_reported_without_losses(
    tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    from uvim_fsq.config.schema import TrainConfig

    shown = Progress(TrainConfig(out=str(tmp_path)), "lm", 50, 10, main=True)
    for step in range(11, 14):
        clock.now += 60
        shown.stepped(step)
    shown.close()
    assert capsys.readouterr().err.splitlines() == [
        "lm 11/50  eta 0:39:00",
        "lm 12/50  eta 0:38:00",
        "lm 13/50  eta 0:37:00",
    ]


def test_damaged_log_lines_are_skipped_with_a_warning(tmp_path: Path, data: Path, quick_evaluation: None) -> None:
    out = fit_run(oracle_run(tmp_path / "run", data, "train.steps=3"))
    file = out / "metrics.jsonl"
    good = file.read_bytes()
    count = len(good.splitlines())
    file.write_bytes(good + b'{"step": 1, "loss": \xff}\n[1]\n{"step": "1"}\n' + b"[" * 100_000 + b'\n{"step": 2, "lo')
    with pytest.warns(UserWarning, match=f"metrics.jsonl: skipped 3 damaged line.s., the first is line {count + 1}"):
        lines = read_json_lines(file)
    assert len(lines) == count + 1
    with pytest.warns(UserWarning, match="damaged line"):
        fit_run(oracle_run(out, data, "train.steps=4", "train.resume=auto", *CHANGED))
    again = read_json_lines(file)
    assert again[:count] == lines[:count] and {line["step"] for line in again[count:]} == {4}
    file.unlink()
    assert read_json_lines(file) == []
    file.mkdir()
    with pytest.raises(UserError, match="metrics.jsonl cannot be read"):
        read_json_lines(file)
