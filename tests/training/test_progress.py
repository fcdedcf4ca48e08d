"""The log of training."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.runs import CHANGED, fit_run
from tests.support.small import oracle_run
from uvim_fsq.errors import UserError
from uvim_fsq.files import read_json_lines


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
