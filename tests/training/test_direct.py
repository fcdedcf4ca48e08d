"""Training of the direct baseline, and its results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.cli import failure
from tests.support.runs import at, fit_run
from tests.support.small import direct_run
from uvim_fsq.checkpoints.loading import load_checkpoint, load_direct
from uvim_fsq.checkpoints.run_directory import checkpoints
from uvim_fsq.errors import UserError
from uvim_fsq.evaluation.results import read_result
from uvim_fsq.training.stages import DirectStage, build_stage


def test_a_trained_run_holds_its_result_and_no_oracle(direct_dir: Path) -> None:
    result = read_result(direct_dir)
    assert list(result["figures"]) == ["direct"] and result["code_counts"] == {}
    assert result["decoding"] == {"precision": "fp32"}
    assert not (direct_dir / "oracle").exists() and list((direct_dir / "panels").iterdir())


@pytest.mark.slow
def test_the_best_checkpoint_on_a_holdout_is_the_result(tmp_path: Path, data: Path) -> None:
    keys = ["train.eval_every=2", "train.keep=9", "data.selection_split=holdout", "train.ema=0.5"]
    out = fit_run(direct_run(tmp_path / "run", data, *keys))
    values = {path: json.loads((path / "evaluation.json").read_text())["figures"]["rmse"] for path in checkpoints(out)}
    loaded = load_direct(out)
    assert len(values) == 3 and loaded.checkpoint == min(values, key=lambda path: values[path])
    assert loaded.chosen.startswith("best rmse on holdout")


def test_a_run_keeps_its_model_when_it_is_resumed(direct_dir: Path, data: Path) -> None:
    with pytest.raises(UserError, match=r"model.patch_size=8 \(trained with 4\)"):
        fit_run(direct_run(direct_dir, data, "model.patch_size=8", "train.resume=auto"))


def test_seeds_decide_the_initial_weights(tmp_path: Path, data: Path) -> None:
    def weight(seed: int) -> float:
        stage = build_stage(direct_run(tmp_path / "run", data, f"train.seed={seed}"))
        assert isinstance(stage, DirectStage) and stage.quantizer is None
        return float(stage.direct.stem.weight.sum())

    assert weight(1) == weight(1) != weight(2)


def test_where_tokens_are_needed_a_direct_run_is_refused(
    direct_dir: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="has no tokens; give an oracle's or an LM's run"):
        load_checkpoint(direct_dir)
    assert "has no tokens" in failure(capsys, "analyze", direct_dir, "--out", tmp_path / "analysis")
    said = failure(capsys, "train-lm", "nyu_depth/quickstart_lm", f"oracle={direct_dir}", f"train.out={tmp_path / 'x'}")
    assert "is a checkpoint of stage 'direct', not an oracle" in said
    said = failure(capsys, "benchmark", "loader", "nyu_depth/quickstart_direct")
    assert "is a configuration of stage 'direct'; the benchmark measures oracles and LMs" in said


def test_runs_with_tokens_are_no_direct_runs(oracle_dir: Path) -> None:
    with pytest.raises(UserError, match="is a run of stage 'oracle'; give one of stage 'direct'"):
        load_direct(at(oracle_dir, 6))
