"""Which checkpoint becomes a run's result."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.runs import STEPS, at, fit_run
from tests.support.small import oracle_run
from uvim_fsq.checkpoints import files as ckpt
from uvim_fsq.checkpoints.loading import load_checkpoint
from uvim_fsq.checkpoints.run_directory import checkpoints, step_name
from uvim_fsq.evaluation.run import evaluate
from uvim_fsq.files import read_json_lines


@pytest.mark.slow
def test_the_best_checkpoint_is_never_chosen_on_the_reported_split(
    tmp_path: Path, data: Path, quick_evaluation: None
) -> None:
    keys = [*STEPS, "data.selection_split=train", "train.eval_limit=5"]
    watched = fit_run(oracle_run(tmp_path / "watched", data, *keys))
    values = {p.name: json.loads((p / ckpt.FIGURES).read_text()) for p in checkpoints(watched)}
    best = min(values, key=lambda name: values[name]["figures"]["rmse"])
    assert best != step_name(8)
    assert all((v["split"], v["images"], v["protocol"]) == ("train", 5, "nyu_depth/full") for v in values.values())
    loaded = load_checkpoint(watched)
    assert (loaded.checkpoint.name, loaded.chosen) == (best, "best rmse on train, 5 images")
    other = load_checkpoint(watched, ["data.eval_split=train"])
    assert (other.checkpoint.name, other.chosen) == (step_name(8), "last")
    given = load_checkpoint(at(watched, 8))
    assert (given.checkpoint.name, given.chosen) == (step_name(8), "given")
    for watch in ("", "val"):
        unselected = fit_run(oracle_run(tmp_path / f"unselected{watch}", data, *STEPS, f"data.selection_split={watch}"))
        assert [p.name for p in checkpoints(unselected)] == [step_name(8)]
        assert load_checkpoint(unselected).chosen == "last"


def test_a_result_records_how_its_checkpoint_was_chosen(oracle_dir: Path) -> None:
    assert json.loads((oracle_dir / "evaluation.json").read_text())["chosen"] == "last"
    assert evaluate(oracle_dir, limit=2)["chosen"] == "last"
    assert evaluate(checkpoints(oracle_dir)[-1], limit=2)["chosen"] == "given"


@pytest.mark.slow
def test_all_evaluations_of_a_run_use_the_same_number_of_images(tmp_path: Path, data: Path) -> None:
    keys = ["train.steps=4", "train.eval_every=2", "train.eval_limit=3", "train.log_every=9"]
    lines = read_json_lines(fit_run(oracle_run(tmp_path / "run", data, *keys)) / "metrics.jsonl")
    assert [line["eval/images"] for line in lines if "eval/images" in line] == [3, 3]
    keys = ["train.steps=3", "eval.limit=4", "data.selection_split=train"]
    run_dir = fit_run(oracle_run(tmp_path / "limited", data, *keys))
    assert load_checkpoint(run_dir).chosen == "best rmse on train, 4 images"
    run_dir = fit_run(
        oracle_run(tmp_path / "all", data, "train.steps=3", "data.selection_split=train", "eval.limit=99")
    )
    assert load_checkpoint(run_dir).chosen == "best rmse on train, 24 images"
