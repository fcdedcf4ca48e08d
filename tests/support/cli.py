"""Runs commands in the process of the test."""

from __future__ import annotations

from pathlib import Path

import pytest

from uvim_fsq.cli import main


def failure(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """Runs a command that must fail with exit code 2 and one line, and returns this line."""
    with pytest.raises(SystemExit) as caught:
        main([str(a) for a in arguments])
    assert caught.value.code == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), captured.err
    return lines[0]
