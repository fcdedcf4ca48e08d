"""The command line in a process of its own: help, one-line errors, exit codes."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
import yaml

import uvim_fsq
from tests.support.cli import run_command
from tests.support.small import ORACLE
from uvim_fsq.cli import main


@pytest.mark.slow
def test_help_lists_commands_and_keys() -> None:
    assert "quickstart" in run_command("--help").stdout
    text = run_command("train-oracle", "--help").stdout
    for words in ("optim.lr", "Peak learning rate.", "model.quantizer.levels", "task.num_bins", "default 0.001"):
        assert words in text
    for command in ("config", "evaluate", "predict"):
        assert "eval.temperature" in run_command(command, "--help").stdout


def test_errors_are_one_line_in_a_real_process(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(yaml.safe_dump(ORACLE))
    done = run_command("train-oracle", file, "optim.lrr=3")
    assert done.returncode == 2 and done.stderr.strip() == "error: unknown key optim.lrr; did you mean optim.lr?"
    assert "Traceback" in run_command("--debug", "train-oracle", file, "optim.lrr=3").stderr


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0 and capsys.readouterr().out == f"uvim-fsq {uvim_fsq.__version__}\n"


def test_names_that_are_not_utf_8_are_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(content := io.BytesIO(), "utf-8", write_through=True))
    monkeypatch.setattr("uvim_fsq.commands.runs.run", lambda args: print(os.fsdecode(b"a\xff")))
    main(["runs"])
    assert content.getvalue() == b"a\\udcff\n"
