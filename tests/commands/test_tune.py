"""`uvim-fsq tune`, and what follows from it in `evaluate` and `predict`."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.support.cli import failure
from tests.support.tuning import SETTINGS, write_tuned
from uvim_fsq.checkpoints.run_directory import checkpoints
from uvim_fsq.cli import main
from uvim_fsq.errors import UserError
from uvim_fsq.evaluation.tuning import Grid
from uvim_fsq.inference.predictor import Predictor


@pytest.fixture
def run_dir(tmp_path: Path, held_out_lm: Path) -> Path:
    return shutil.copytree(held_out_lm, tmp_path / "run")


def test_tune_prints_the_best_settings_and_stores_them(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lists = ["--codes", "soft", "--scales", "1,0.5", "--weights", "0, 0.25", "--samples", "2", "--temperature", "0.5"]
    main(["tune", str(run_dir), *lists, "eval.batch_size=2"])
    said = capsys.readouterr().out
    file = checkpoints(run_dir)[-1] / "decoding.json"
    assert f"written: {file}; eval.tuned=false ignores it" in said and f"next: uvim-fsq evaluate {run_dir}" in said
    assert "nyu_depth/full on holdout, 5 images" in said
    for word in ("chosen", "before", "context alone", "scale", "rmse"):
        assert word in said
    result = json.loads(file.read_text())
    tried = {key: {row[key] for row in result["candidates"]} for key in result["settings"]}
    assert tried == {
        "codes": {"hard", "soft"},  # hard are the run's own
        "code_scale": {1.0, 0.5},
        "context_weight": {0.0, 0.25},
        "samples": {1, 2},
        "temperature": {0.0, 0.5},
        "top_k": {None},
        "top_p": {None},
        "steps": {None},
        "choice_temperature": {0.0},
    }
    assert len(result["candidates"]) == 1 + 2 * 4
    assert ("try larger ones" in said) == (result["settings"]["context_weight"] == 0.25)
    assert ("add nothing" in said) == (result["context_only"] <= result["value"])


def test_context_alone_is_told_as_such_and_no_larger_weight_is_suggested(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["tune", str(run_dir), "eval.context_weight=1", "--codes", "hard", "--scales", "1", "--weights", "1"])
    said = capsys.readouterr().out
    assert "none of them is better than context alone" in said and "try larger ones" not in said


def printed(
    rows: dict[float, float],
    context: float | None,
    run_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    *,
    smaller_is_better: bool = True,
) -> str:
    """What is printed if the context weights `rows` reach these figures. The first are the run's own settings."""
    settings = {"codes": "hard", "choice_temperature": 0.0}
    tried = [{**settings, "context_weight": weight, "rmse": value} for weight, value in rows.items()]
    finite = [row for row in tried if math.isfinite(row["rmse"])]
    best = (min if smaller_is_better else max)(finite, key=lambda row: row["rmse"])
    result = {
        "settings": {key: best[key] for key in (*settings, "context_weight")},
        "candidates": tried,
        "value": best["rmse"],
        "own": tried[0],
        "context_only": context,
        "metric": "rmse",
        "smaller_is_better": smaller_is_better,
        "protocol": "nyu_depth/full",
        "split": "holdout",
        "images": 5,
        "checkpoint": str(run_dir),
    }
    monkeypatch.setattr("uvim_fsq.evaluation.tuning.tune", lambda *args, **keys: result)
    main(["tune", str(run_dir)])
    return capsys.readouterr().out


def test_without_options_the_default_settings_are_tried_on_the_hold_out(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(run: str, overrides: list[str], **given: Any) -> None:
        assert run == str(run_dir) and given == {"split": "holdout", "unseen": False, "limit": None, "grid": Grid()}
        raise UserError("seen")

    monkeypatch.setattr("uvim_fsq.evaluation.tuning.tune", stop)
    assert "seen" in failure(capsys, "tune", run_dir)


#: Context weight -> figure.
FIGURES = {0.0: 0.7, 0.1: math.nan, 0.2: 0.4, 0.3: 0.6, 0.4: 0.5, 0.5: 0.8, 0.6: 0.9}


@pytest.mark.parametrize(
    ("smaller_is_better", "order"),
    [
        (True, ["0.4000", "0.5000", "0.6000", "0.7000", "0.8000"]),
        (False, ["0.9000", "0.8000", "0.7000", "0.6000", "0.5000"]),
    ],
)
def test_the_five_best_settings_are_printed_in_order_with_what_differs(
    run_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    smaller_is_better: bool,
    order: list[str],
) -> None:
    said = printed(FIGURES, 0.65, run_dir, monkeypatch, capsys, smaller_is_better=smaller_is_better)
    assert re.findall(r"0\.\d{4}", said) == [*order, "0.7000", "0.6500"]
    assert "context weight" in said and "codes" not in said and "choice temp." not in said
    assert (said.index("chosen") < said.index(order[0]) < said.index("before")) and "add nothing" not in said


@pytest.mark.parametrize(
    ("figures", "context", "larger", "nothing"),
    [
        ({0.0: 0.5, 0.4: 0.4}, 0.6, True, False),
        ({0.0: 0.4, 0.4: 0.5}, 0.6, False, False),
        ({0.0: 0.5, 1.0: 0.4}, 0.6, False, False),
        ({0.0: 0.5, 0.4: 0.6}, 0.5, False, True),
        ({0.0: 0.5, 0.4: 0.6}, 0.4, False, True),
        ({0.0: 0.5}, None, False, False),
    ],
)
def test_hints_follow_from_the_figures(
    run_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    figures: dict[float, float],
    context: float | None,
    larger: bool,
    nothing: bool,
) -> None:
    said = printed(figures, context, run_dir, monkeypatch, capsys)
    assert ("try larger ones" in said) == larger and ("add nothing" in said) == nothing
    assert ("context alone" in said) == (context is not None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scales", "half"], "--scales half: give a list such as 0,0.5"),
        (["--samples", "1.5"], "--samples 1.5: give a list such as 4,8"),
        (["--codes", "soft,both"], "--codes soft,both: give a list such as hard,soft"),
        (["--temperature", "0.7"], "--temperature 0.7 is that of the samples of --samples; give both"),
        (["--samples", "2", "--temperature", "0"], "eval.samples=2 with eval.temperature=0"),
        (["--split", "val"], "split val is the one that is reported"),
        (["eval.codes=both"], "eval.codes"),
        (["--limit", "0"], "eval.limit=0: must be above 0"),
    ],
)
def test_mistakes_are_one_line(
    run_dir: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert message in failure(capsys, "tune", run_dir, *arguments)
    assert not (checkpoints(run_dir)[-1] / "decoding.json").exists()


def test_a_place_that_cannot_be_written_is_refused_before_the_work(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("uvim_fsq.evaluation.tuning.tune", lambda *args, **keys: pytest.fail("the work began"))
    (checkpoints(run_dir)[-1] / "decoding.json").mkdir()
    assert "decoding.json: it is a folder" in failure(capsys, "tune", run_dir)


@pytest.mark.slow
def test_evaluate_names_the_tuned_settings_and_keeps_the_runs_own_result(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["evaluate", str(run_dir)])
    own = json.loads((run_dir / "evaluation.json").read_text())
    assert own["decoding_from"] == "the run"
    write_tuned(run_dir)
    capsys.readouterr()
    main(["evaluate", str(run_dir), "--report", str(run_dir / "page.html")])
    said = capsys.readouterr().out
    assert "decoding: tuned on holdout, 5 images" in said and "eval.codes=soft (trained with hard)" in said
    assert json.loads((run_dir / "evaluation.json").read_text()) == own
    (file,) = run_dir.glob("evaluation_*.json")
    result = json.loads(file.read_text())
    assert {key: result["decoding"][key] for key in SETTINGS} == SETTINGS
    assert result["decoding_from"] == "tuned on holdout, 5 images"
    assert result["figures"]["lm"]["rmse"] != own["figures"]["lm"]["rmse"]
    page = (run_dir / "page.html").read_text()
    assert "code_scale=0.7" in page and "tuned on holdout, 5 images" in page
    main(["evaluate", str(run_dir), "eval.tuned=false"])
    assert len(list(run_dir.glob("evaluation*.json"))) == 2, "the run's own settings have their own name"


@pytest.mark.slow
def test_predict_uses_the_settings_that_evaluate_uses(run_dir: Path, tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3)).astype(np.uint8)).save(photo)
    write_tuned(run_dir)
    main(["predict", str(run_dir), str(photo), "--out", str(tmp_path / "tuned")])
    (entry,) = json.loads((tmp_path / "tuned" / "predictions.json").read_text())
    assert entry["decoding_from"] == "tuned on holdout, 5 images" and "eval.codes=soft" in entry["overrides"]
    given = [f"eval.{key}={value}" for key, value in SETTINGS.items()]
    by_hand = Predictor.from_run(run_dir, ["eval.tuned=false", *given])
    assert "decoding_from" not in by_hand.provenance
    found = np.load(entry["npy"])
    assert np.array_equal(found, by_hand.predict(photo))
    assert not np.array_equal(found, Predictor.from_run(run_dir, ["eval.tuned=false"]).predict(photo))
    # The provenance is not taken for a file of results, which would be missing.
    other = shutil.copy(photo, tmp_path / "other.png")
    main(["predict", str(run_dir), str(other), "--out", str(tmp_path / "tuned")])
    assert len(json.loads((tmp_path / "tuned" / "predictions.json").read_text())) == 2
