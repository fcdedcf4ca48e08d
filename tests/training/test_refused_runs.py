"""Runs that training refuses before the first step, and a loss that is not finite."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.runs import fit_run
from tests.support.small import lm_run, oracle_run
from uvim_fsq.errors import UserError


def test_a_batch_larger_than_the_data_is_refused(tmp_path: Path, data: Path) -> None:
    with pytest.raises(UserError, match="exceeds the 24 training samples"):
        fit_run(oracle_run(tmp_path / "run", data, "train.batch_size=64"))


def test_a_loss_that_is_not_finite_stops_training(tmp_path: Path, data: Path) -> None:
    with pytest.raises(UserError, match="not finite at step [1-6];"):
        fit_run(oracle_run(tmp_path / "run", data, "optim.lr=1e30", "optim.clip_norm=null", "train.log_every=6"))


def test_a_run_with_checkpoints_is_not_overwritten(oracle_dir: Path, data: Path) -> None:
    with pytest.raises(UserError, match="train.resume=auto"):
        fit_run(oracle_run(oracle_dir, data))


def test_resuming_from_a_missing_run_is_refused(tmp_path: Path, data: Path) -> None:
    with pytest.raises(UserError, match="no such run"):
        fit_run(oracle_run(tmp_path / "run", data, f"train.resume={tmp_path / 'nowhere'}"))


def test_an_lm_needs_the_run_of_an_oracle(tmp_path: Path, lm_dir: Path) -> None:
    with pytest.raises(UserError, match="not an oracle"):
        lm_run(tmp_path / "run", lm_dir)
    with pytest.raises(UserError, match="contains no checkpoint"):
        lm_run(tmp_path / "run", tmp_path)


@pytest.mark.parametrize(
    ("key", "message"),
    [("data.image_size=32", "was trained at 16"), ("task.num_bins=8", "task.num_bins=8 but the oracle")],
)
def test_an_lm_cannot_differ_from_its_oracle(tmp_path: Path, oracle_dir: Path, key: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        lm_run(tmp_path / "run", oracle_dir, key)


def test_an_lm_may_decode_labels_differently_from_its_oracle(tmp_path: Path, oracle_dir: Path) -> None:
    run = lm_run(tmp_path / "run", oracle_dir, "task.decoding=expectation")
    assert run.task.options.decoding == "expectation"
