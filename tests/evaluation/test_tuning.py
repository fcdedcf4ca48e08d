"""The search for decoding settings: what each is worth on the hold-out, and which one is chosen."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.ranks import run_ranks
from tests.support.runs import save_untrained
from tests.support.small import lm_run, oracle_run
from uvim_fsq.checkpoints.loading import LoadedRun, load_checkpoint
from uvim_fsq.checkpoints.tuned import TUNED_KEYS
from uvim_fsq.config.schema import EvalConfig, LMRun
from uvim_fsq.errors import UserError
from uvim_fsq.evaluation.evaluator import Evaluator
from uvim_fsq.evaluation.tuning import Grid, best_setting, tune
from uvim_fsq.inference.predictions import context_predictions, lm_predictions
from uvim_fsq.oracle import chunking
from uvim_fsq.tasks.nyu_depth.task import NYUDepth

CPU = torch.device("cpu")
GRID = Grid(scales=(1.0, 0.5), weights=(0.0, 0.3), samples=(2, 3), temperature=0.8)
#: Depth as the mean over its bins changes with every probability.
KEYS = ["task.decoding=expectation"]


@pytest.fixture
def run_dir(tmp_path: Path, held_out_lm: Path) -> Path:
    return shutil.copytree(held_out_lm, tmp_path / "run")


def on_hold_out(loaded: LoadedRun, config: EvalConfig | None) -> float:
    """The error of settings, or of context alone, by the evaluator."""
    evaluator = Evaluator(loaded.task, replace(loaded.run.data, eval_split="holdout"), loaded.run.eval)
    predict = context_predictions(loaded.oracle, loaded.task)
    if config is not None:
        assert loaded.lm is not None
        predict = lm_predictions(loaded.lm, loaded.oracle, loaded.task, config)
    return evaluator.run(predict, CPU)["rmse"]


@pytest.mark.slow
def test_every_candidate_is_worth_what_an_evaluation_says(run_dir: Path) -> None:
    result = tune(run_dir, KEYS, grid=GRID)
    loaded = load_checkpoint(run_dir, KEYS, tuned=False)
    assert len(result["candidates"]) == 2 * 2 * 2 * 3
    for row in result["candidates"]:
        config = replace(loaded.run.eval, **{key: row[key] for key in TUNED_KEYS})
        assert row["rmse"] == pytest.approx(on_hold_out(loaded, config), abs=1e-5), row
    assert len({round(row["rmse"], 6) for row in result["candidates"]}) == 24
    assert result["context_only"] == pytest.approx(on_hold_out(loaded, None), abs=1e-5)
    best = min(result["candidates"], key=lambda row: row["rmse"])
    assert {**result["settings"], "rmse": result["value"]} == best
    assert result["own"] == result["candidates"][0] and result["own"]["codes"] == "hard"


def test_the_evaluation_split_is_never_read(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    source = NYUDepth.source
    monkeypatch.setattr(NYUDepth, "source", lambda self, root, split: read.append(split) or source(self, root, split))
    result = tune(run_dir, grid=Grid(scales=(1.0,), weights=(0.0,)))
    assert read == ["holdout"] and result["split"] == result["data"]["split"] == "holdout"
    assert result["images"] == 5


@pytest.mark.slow
def test_the_choice_is_stored_and_used(run_dir: Path) -> None:
    result = tune(run_dir, [*KEYS, "eval.seed=4"], limit=4, grid=GRID)
    loaded = load_checkpoint(run_dir, KEYS)
    assert json.loads((loaded.checkpoint / "decoding.json").read_text()) == json.loads(json.dumps(result))
    assert {key: getattr(loaded.run.eval, key) for key in TUNED_KEYS} == result["settings"]
    assert loaded.decoding_from == "tuned on holdout, 4 images"
    assert (result["images"], result["limit"], result["decoding"]["seed"]) == (4, 4, 4)
    assert result["metric"] == "rmse" and result["smaller_is_better"] and result["protocol"] == "nyu_depth/full"
    assert result["versions"]["torch"] == torch.__version__
    # Tuning again starts from the run's own settings.
    again = tune(run_dir, [*KEYS, "eval.seed=4"], limit=4, grid=GRID)
    assert again["candidates"] == result["candidates"] and again["own"] == result["own"]


@pytest.mark.slow
def test_results_do_not_depend_on_batches_or_chunks(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = tune(run_dir, [*KEYS, "eval.batch_size=5"], grid=GRID)
    monkeypatch.setattr(chunking, "MAX_LOGITS", 2 * 16 * 16 * 16)
    two = tune(run_dir, [*KEYS, "eval.batch_size=3"], grid=GRID)
    for row, other in zip(one["candidates"], two["candidates"], strict=True):
        assert row["rmse"] == pytest.approx(other["rmse"], abs=1e-5)


@pytest.mark.slow
def test_several_processes_tune_together(run_dir: Path) -> None:
    one = tune(run_dir, KEYS)
    file = Path(one["checkpoint"]) / "decoding.json"
    file.unlink()
    said = run_ranks(2, "cli", "tune", str(run_dir), *KEYS)
    assert said.count("written: ") == 1
    two = json.loads(file.read_text())
    assert two["images"] == 5 and two["settings"] == one["settings"]
    for row, other in zip(one["candidates"], two["candidates"], strict=True):
        assert row["rmse"] == pytest.approx(other["rmse"], abs=1e-6)


@pytest.mark.slow
def test_masked_models_are_tuned_over_their_steps(tmp_path: Path, held_out_lm: Path) -> None:
    trained = load_checkpoint(held_out_lm).run
    assert isinstance(trained, LMRun)
    run_dir = save_untrained(lm_run(tmp_path / "lm", Path(trained.oracle), "model.kind=masked"))
    result = tune(run_dir, KEYS, grid=Grid(scales=(1.0,), weights=(0.0,), steps=(4, 2), samples=(2,)))
    loaded = load_checkpoint(run_dir, KEYS, tuned=False)
    assert [(row["samples"], row["steps"]) for row in result["candidates"]][::2] == [
        (samples, steps) for samples in (1, 2) for steps in (None, 2, 4)
    ]
    for row in result["candidates"]:
        config = replace(loaded.run.eval, **{key: row[key] for key in TUNED_KEYS})
        assert row["rmse"] == pytest.approx(on_hold_out(loaded, config), abs=1e-5), row
    with pytest.raises(UserError, match="eval.steps=5 exceeds the 4 tokens"):
        tune(run_dir, grid=Grid(steps=(5,)))


def test_candidates_go_from_simple_to_elaborate() -> None:
    own = EvalConfig(code_scale=0.9)
    tried = Grid(samples=(8, 4)).settings(own, has_context=True)
    assert tried[0] == own and len(tried) == len(set(tried)) == 1 + 3 * 2 * 4 * 6
    keys = [(s.samples, s.codes, s.code_scale, s.context_weight, s.temperature) for s in tried]
    assert keys[1:4] == [(1, "hard", 1.0, 0.0, 0.0), (1, "hard", 1.0, 0.1, 0.0), (1, "hard", 1.0, 0.2, 0.0)]
    assert keys[7] == (1, "hard", 0.85, 0.0, 0.0) and keys[25] == (1, "soft", 1.0, 0.0, 0.0)
    assert keys[49] == (4, "hard", 1.0, 0.0, 1.0) and keys[-1] == (8, "soft", 0.5, 0.5, 1.0)


def test_the_best_is_the_first_of_equals_in_the_metrics_direction() -> None:
    one, two, three = (EvalConfig(seed=seed) for seed in range(3))
    assert best_setting({one: 0.5, two: 0.4, three: 0.4}, smaller_is_better=True) == two
    assert best_setting({one: 0.5, two: 0.5, three: 0.4}, smaller_is_better=False) == one
    assert best_setting({one: float("nan"), two: 0.5, three: float("inf")}, smaller_is_better=False) == two
    with pytest.raises(UserError, match="no setting has a finite result"):
        best_setting({one: float("nan")}, smaller_is_better=True)


@pytest.mark.slow
def test_without_context_nothing_is_mixed(tmp_path: Path, held_out_lm: Path) -> None:
    trained = load_checkpoint(held_out_lm).run.data
    splits = ("data.train_split=train_minus_holdout", "data.selection_split=holdout")
    oracle = save_untrained(oracle_run(tmp_path / "oracle", Path(trained.root), "model.context=none", *splits))
    run = save_untrained(lm_run(tmp_path / "lm", oracle))
    result = tune(run)
    assert {row["context_weight"] for row in result["candidates"]} == {0.0} and result["context_only"] is None
    with pytest.raises(UserError, match=r"eval.context_weight=0.2: .* does not see the image"):
        tune(run, grid=Grid(weights=(0.0, 0.2)))


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"weights": (1.5,)}, "eval.context_weight=1.5: must be at most 1"),
        ({"scales": (-1.0,)}, "eval.code_scale=-1.0: must not be negative"),
        ({"samples": (4,), "temperature": 0.0}, "eval.samples=4 with eval.temperature=0"),
    ],
)
def test_values_out_of_range_are_refused(run_dir: Path, grid: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tune(run_dir, grid=Grid(**grid))


def test_a_protocol_without_a_choosing_metric_is_refused(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NYUDepth, "choosing_metric", None)
    with pytest.raises(UserError, match="this protocol reports a metric by which nothing is chosen; set eval.codes"):
        tune(run_dir)
