"""`uvim-fsq synth` and `uvim-fsq data check`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.cli import run_command


@pytest.mark.slow
def test_synth_and_data_check(tmp_path: Path) -> None:
    out = tmp_path / "rooms"
    done = run_command("synth", "--format", "nyu", "--num", "4", "--num-val", "2", "--size", "16x20", "--out", out)
    assert done.returncode == 0, done.stderr
    done = run_command("data", "check", out, "--task", "nyu_depth")
    assert done.returncode == 0 and "layout B" in done.stdout and "official 47584: DIFFERS" in done.stdout
    assert "16 x 20" in done.stdout
