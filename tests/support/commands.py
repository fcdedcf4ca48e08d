"""Commands of the command line that must fail as a user's mistake, run in this process."""

from __future__ import annotations

import pytest

from uvim_fsq.cli import main


def error_lines(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[str]:
    """All lines of standard error of a command that must end with exit code 2."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert ended.value.code == 2, captured.err
    return captured.err.strip().splitlines()


def error_line(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The only line of standard error of a command that must end with exit code 2."""
    lines = error_lines(capsys, *arguments)
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]
