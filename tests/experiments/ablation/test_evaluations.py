"""Rows that evaluate a trained LM in another way, and the comparison of rows."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.grids import write_grid
from tests.support.small import DIRECT
from uvim_fsq.cli import main
from uvim_fsq.errors import UserError
from uvim_fsq.evaluation import intervals
from uvim_fsq.evaluation.results import states_file
from uvim_fsq.evaluation.run import evaluate
from uvim_fsq.experiments.ablation import report
from uvim_fsq.experiments.ablation.grid import plan, read_grid

ROWS: dict[str, Any] = {
    "hard": {},
    "soft": {"eval": {"eval.codes": "soft"}},
    "tuned": {"eval": {"eval.seed": 1}, "tune": "holdout"},
}


def test_rows_that_only_evaluate_differently_share_the_training(tmp_path: Path) -> None:
    cells = plan(read_grid(write_grid(tmp_path, rows=ROWS)), tmp_path / "out")
    assert len({cell.result.folder for cell in cells}) == 1 and len({cell.file for cell in cells}) == 3
    hard, soft, tuned = cells
    assert hard.evaluation == () and hard.file == hard.result.folder / "evaluation.json"
    ((command, run, *settings),) = soft.evaluation
    assert command == "evaluate" and run == str(soft.result.folder)
    assert settings[:2] == ["eval.codes=soft", "eval.tuned=false"], "another row may have tuned the run"
    assert settings[2:] == ["--json", str(soft.file), "--states", str(states_file(soft.file))]
    assert tuned.evaluation[0] == ("tune", run, "--split", "holdout", "eval.seed=1")
    assert tuned.evaluation[1][2:4] == ("eval.seed=1", "eval.tuned=true")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"compare": "soft"}, "`compare` must name a row, and there is none named 'soft'"),
        ({"rows": {"a": {"eval": "soft"}}}, "`rows.a.eval` must be a mapping of settings"),
        ({"direct": "direct.yaml", "rows": {"a": {"direct": {}, "tune": "val"}}}, "it has no tokens to tune"),
    ],
)
def test_rows_that_cannot_be_evaluated_are_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    (tmp_path / "direct.yaml").write_text(yaml.safe_dump(DIRECT))
    with pytest.raises(UserError, match=said):
        read_grid(write_grid(tmp_path, **changes))


def test_rows_are_compared_by_paired_intervals(tmp_path: Path, lm_dir: Path) -> None:
    rows = {"hard": {}, "scaled": {"eval": {"eval.code_scale": 0.5}}}
    grid = read_grid(write_grid(tmp_path, rows=rows, compare="hard"))
    hard, scaled = plan(grid, tmp_path / "out")
    shutil.copytree(lm_dir, hard.result.folder)
    results = {}
    for cell, settings in ((hard, []), (scaled, ["eval.code_scale=0.5"])):
        results[cell] = evaluate(lm_dir, settings, states=states_file(cell.file))
        cell.file.write_text(json.dumps(results[cell]))
    first, second = report.collect(grid, [hard, scaled], {})["rows"]
    assert list(first["intervals"]) == ["context alone"] and list(second["intervals"]) == ["context alone", "hard"]
    found = second["intervals"]["hard"]
    gap = results[scaled]["figures"]["lm"]["rmse"] - results[hard]["figures"]["lm"]["rmse"]
    assert found["difference"] == pytest.approx(gap) and found["low"] <= gap <= found["high"] and found["n"] == 1
    text = report.results_markdown(report.collect(grid, [hard, scaled], {}))
    assert "rmse - hard (95%)" in text and f"{gap:+.3f} [" in text
    states_file(hard.file).unlink()
    assert list(report.collect(grid, [hard, scaled], {})["rows"][1]["intervals"]) == ["context alone"]


def test_tables_written_after_each_cell_resample_only_new_states(
    tmp_path: Path, lm_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = read_grid(write_grid(tmp_path, rows={"hard": {}}))
    (cell,) = plan(grid, tmp_path / "out")
    shutil.copytree(lm_dir, cell.result.folder)
    evaluate(lm_dir, states=states_file(cell.file))
    drawn: list[object] = []

    def resampled(*arguments: Any) -> intervals.Resampled:
        drawn.append(arguments)
        return intervals.resampled(*arguments)

    monkeypatch.setattr(report, "resampled", resampled)
    first = report.collect(grid, [cell], {})
    assert len(drawn) == 2 and report.collect(grid, [cell], {}) == first and len(drawn) == 2
    os.utime(states_file(cell.file), (1, 1))
    assert report.collect(grid, [cell], {}) == first and len(drawn) == 4, "the states were written again"


@pytest.mark.slow
def test_a_grid_trains_once_and_evaluates_every_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = write_grid(tmp_path, rows={"hard": ROWS["hard"], "soft": ROWS["soft"]}, compare="hard"), tmp_path / "o"
    main(["ablate", str(file), "--out", str(out)])
    said = capsys.readouterr().out
    assert said.count("training the lm") == 1 and said.count("evaluation") == 1
    hard, soft = json.loads((out / "results.json").read_text())["rows"]
    assert hard["columns"]["context alone rmse"] == soft["columns"]["context alone rmse"]
    assert "hard" in soft["intervals"] and soft["settings"]["eval"] == ["eval.codes=soft"]
    main(["ablate", str(file), "--out", str(out)])
    assert "training the" not in (said := capsys.readouterr().out) and ": evaluation" not in said
