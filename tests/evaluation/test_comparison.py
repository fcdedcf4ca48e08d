"""An LM's result with a row of a direct run, and runs that cannot be compared."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.cli import failure
from tests.support.small import direct_run, small_data
from uvim_fsq.checkpoints.files import file_hash
from uvim_fsq.checkpoints.loading import load_direct
from uvim_fsq.cli import main
from uvim_fsq.errors import UserError
from uvim_fsq.evaluation.run import evaluate
from uvim_fsq.reports import evaluation_page
from uvim_fsq.training.run import train


@pytest.fixture(scope="module")
def compared(
    lm_dir: Path, direct_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[dict[str, Any], Path]]:
    """The result of both runs on five images, and the file of the metrics per image."""
    rows = tmp_path_factory.mktemp("compared") / "rows.csv"
    yield evaluate(lm_dir, ["eval.seed=3", "eval.batch_size=3"], limit=5, csv=rows, compare=direct_dir), rows


def test_a_comparison_adds_the_figures_that_the_direct_run_has_alone(
    compared: tuple[dict[str, Any], Path], lm_dir: Path, direct_dir: Path
) -> None:
    result, _ = compared
    assert list(result["figures"]) == ["oracle", "context_only", "lm", "direct"]
    assert result["figures"]["direct"] == evaluate(direct_dir, limit=5)["figures"]["direct"]
    plain = evaluate(lm_dir, limit=5)
    assert {name: result["figures"][name] for name in plain["figures"]} == plain["figures"]
    assert set(result["code_counts"]) == {"oracle", "lm"} and result["checkpoint"] == plain["checkpoint"]


def test_a_comparison_says_which_direct_checkpoint_it_used(
    compared: tuple[dict[str, Any], Path], direct_dir: Path
) -> None:
    about = compared[0]["compared"]["direct"]
    checkpoint = load_direct(direct_dir).checkpoint
    assert about["checkpoint"] == str(checkpoint) and about["chosen"] == "last"
    assert about["checkpoint_sha256"] == file_hash(checkpoint / "model.safetensors")
    assert about["overrides"] == {"eval.batch_size": [4, 3]}
    assert about["decoding"] == {"precision": "fp32"}


def test_the_table_per_image_has_the_direct_rows(compared: tuple[dict[str, Any], Path]) -> None:
    result, file = compared
    with file.open(newline="") as opened:
        rows = [row for row in csv.DictReader(opened) if row["way"] == "direct"]
    assert len(rows) == 5
    assert sum(float(row["rmse"]) for row in rows) / 5 == pytest.approx(result["figures"]["direct"]["rmse"])


def test_overrides_of_protocol_and_data_apply_to_both(lm_dir: Path, direct_dir: Path) -> None:
    result = evaluate(lm_dir, ["data.eval_split=train", "task.decoding=argmax"], limit=3, compare=direct_dir)
    about = result["compared"]["direct"]
    assert about["data"]["split"] == result["data"]["split"] == "train"
    assert about["task_options"]["decoding"] == "argmax"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["data.eval_split=train"], "images is 6 for .* and 24 for .*; give the same data.root=, data.eval_split="),
        (["task.protocol=eigen"], "protocol is nyu_depth/full for .* and nyu_depth/eigen for .*: their figures cannot"),
    ],
)
def test_runs_measured_on_other_images_or_by_another_protocol_are_refused(
    keys: list[str], message: str, tmp_path: Path, data: Path, lm_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("uvim_fsq.training.run.evaluate", lambda out, **keys: {})
    monkeypatch.setattr("uvim_fsq.training.stages.Stage.evaluate", lambda *_: {"rmse": 1.0})
    monkeypatch.setattr("uvim_fsq.training.stages.Stage.panel", lambda *_: None)
    out = train(direct_run(tmp_path / "direct", data, *keys))
    with pytest.raises(UserError, match=message):
        evaluate(lm_dir, compare=out)


@pytest.mark.slow
def test_other_images_under_the_same_description_are_refused(tmp_path: Path, lm_dir: Path, direct_dir: Path) -> None:
    """As many images in a folder of the same layout, but not the same ones."""
    other = small_data(tmp_path / "other")
    for file in sorted((other / "nyudepthv2" / "val").rglob("*.h5")):
        file.rename(file.with_name(f"x{file.name}"))
    out = train(direct_run(tmp_path / "direct", other))
    with pytest.raises(UserError, match="are others than those of the run it is compared with; give data.root="):
        evaluate(lm_dir, compare=out)
    assert "direct" in evaluate(lm_dir, [f"data.root={other}"], compare=direct_dir)["figures"]


def test_only_a_direct_run_can_be_compared_with_a_run_with_tokens(
    lm_dir: Path, oracle_dir: Path, direct_dir: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    json_file = ("--json", tmp_path / "x.json")
    said = failure(capsys, "evaluate", lm_dir, "--compare", oracle_dir, *json_file)
    assert "is a run of stage 'oracle'; give one of stage 'direct'" in said
    said = failure(capsys, "evaluate", direct_dir, "--compare", direct_dir, *json_file)
    assert "is of a direct run; compare an oracle's or an LM's run with one" in said
    assert "no such run" in failure(capsys, "evaluate", lm_dir, "--compare", tmp_path / "nowhere", *json_file)


def test_several_direct_runs_are_refused_and_not_dropped(
    random_runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    said = failure(capsys, "evaluate", random_runs[1], "--compare", "a", "--compare", "b")
    assert "--compare is given 2 times, but a result has one row of a direct baseline; give one, or" in said


def test_the_command_prints_the_direct_column_and_its_checkpoint(
    lm_dir: Path, direct_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    main(
        [
            "evaluate",
            str(lm_dir),
            "--compare",
            str(direct_dir),
            "--limit",
            "2",
            "--json",
            "x.json",
            "--report",
            "p.html",
        ]
    )
    said = capsys.readouterr().out
    assert "direct" in said and f"direct: checkpoint {load_direct(direct_dir).checkpoint}" in said
    figures = json.loads(Path("x.json").read_text())["figures"]
    page = Path("p.html").read_text()
    assert f"<td>direct: image -&gt; labels</td><td>{figures['direct']['rmse']:.3f}</td>" in page
    assert all(text in page.replace("&#x27;", "'") for text in list(evaluation_page.EXPLANATIONS.values())[1:])


@pytest.mark.slow
def test_a_direct_run_alone_has_a_page_and_no_codebook(direct_dir: Path, tmp_path: Path) -> None:
    main(
        ["evaluate", str(direct_dir), "--baseline", "--json", str(tmp_path / "x.json"), "--report", str(tmp_path / "p")]
    )
    page = (tmp_path / "p").read_text()
    assert "direct: image" in page and "baseline" in page and "<h2>Training" in page and "<h2>Codebook" not in page
