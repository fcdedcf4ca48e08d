"""An LM's run without its oracle."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.support.runs import sign_all
from tests.support.small import lm_run
from uvim_fsq.checkpoints.run_directory import resolve_checkpoint
from uvim_fsq.errors import UserError
from uvim_fsq.evaluation.run import evaluate


def test_a_missing_oracle_is_one_line(tmp_path: Path, lm_dir: Path, oracle_dir: Path) -> None:
    run, gone = tmp_path / "lm", tmp_path / "gone"
    shutil.copytree(lm_dir, run)
    shutil.rmtree(run / "oracle")
    config = resolve_checkpoint(run) / "config.yaml"
    config.write_text(config.read_text().replace(f"oracle: {oracle_dir}", f"oracle: {gone}"))
    sign_all(run)
    with pytest.raises(UserError) as caught:
        evaluate(run)
    assert f"{run / 'oracle'} is missing" in str(caught.value) and str(gone) in str(caught.value)
    with pytest.raises(UserError, match=f"oracle={gone}: no such run or checkpoint directory; train the oracle first"):
        lm_run(tmp_path / "new", gone)
