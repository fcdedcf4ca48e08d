"""Runs commands in this process or in one of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from uvim_fsq.cli import main

ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


def failure(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """Runs a command that must fail with exit code 2 and one line, and returns this line."""
    with pytest.raises(SystemExit) as caught:
        main([str(a) for a in arguments])
    assert caught.value.code == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), captured.err
    return lines[0]


def run_command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs a command in a process of its own."""
    command = [sys.executable, "-m", "uvim_fsq", *map(str, arguments)]
    return subprocess.run(command, env=ENV, capture_output=True, text=True)
