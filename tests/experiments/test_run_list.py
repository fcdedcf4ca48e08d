"""The list of runs below a folder, of every state and with damage."""

from __future__ import annotations

import json
import shutil
import warnings
from datetime import datetime
from pathlib import Path

import pytest

from tests.support.cli import failure
from tests.support.runs import another_process
from uvim_fsq.cli import main
from uvim_fsq.experiments import run_list
from uvim_fsq.experiments.run_list import ListedRun, list_runs
from uvim_fsq.files import read_json_lines


@pytest.fixture
def runs(tmp_path: Path, oracle_dir: Path, random_runs: tuple[Path, Path]) -> Path:
    """A trained oracle, an LM that was never evaluated, and a folder that is no run."""
    shutil.copytree(oracle_dir, tmp_path / "runs" / "b" / "trained")
    shutil.copytree(random_runs[1], tmp_path / "runs" / "a_started")
    (tmp_path / "runs" / "notes" / "checkpoints").mkdir(parents=True)
    return tmp_path / "runs"


def listed(runs: Path) -> dict[str, ListedRun]:
    return {found.run: found for found in list_runs(runs)}


def test_a_finished_run_shows_the_figure_of_its_result(runs: Path, oracle_dir: Path) -> None:
    result = json.loads((oracle_dir / "evaluation.json").read_text())
    found = listed(runs)["b/trained"]
    assert (found.state, found.task, found.stage) == ("finished", "nyu_depth", "oracle")
    assert (found.steps, found.planned) == (6, "6")
    assert found.metric == "rmse" and found.figure == result["figures"]["oracle"]["rmse"]
    assert found.protocol == f"{result['protocol']} (val)" and found.date.startswith("20")


def test_only_runs_are_listed_and_their_own_folders_are_not(runs: Path) -> None:
    assert list(listed(runs)) == ["a_started", "b/trained"], "not a_started/oracle, a copy, nor notes"


def test_a_run_without_a_result_is_interrupted_unless_somebody_trains_it(runs: Path) -> None:
    assert listed(runs)["a_started"].state == "interrupted"
    with another_process(runs / "a_started"):
        assert listed(runs)["a_started"].state == "running"
    assert (runs / "a_started" / ".lock").is_file() and listed(runs)["a_started"].state == "interrupted"


def test_before_the_result_there_is_the_figure_of_training(runs: Path) -> None:
    (runs / "b" / "trained" / "evaluation.json").unlink()
    found = listed(runs)["b/trained"]
    assert found.state == "interrupted" and found.figure is not None
    assert found.protocol == "nyu_depth/full (val, in training)"


@pytest.mark.parametrize("damage", ["{", "[]", '{"figures": 3}'])
def test_a_damaged_run_is_listed_as_such(runs: Path, damage: str) -> None:
    (runs / "b" / "trained" / "evaluation.json").write_text(damage)
    found = listed(runs)
    assert found["b/trained"].state == "damaged" and "evaluation.json is damaged" in found["b/trained"].problem
    assert found["a_started"].state == "interrupted"


@pytest.mark.parametrize("damage", ["train: [", "3", "stage: nothing\n", "stage: lm\ntrain: 3\n", "\x00", "# empty\n"])
def test_a_run_with_a_damaged_configuration_is_listed_as_such(runs: Path, damage: str) -> None:
    (runs / "b" / "trained" / "config.yaml").write_text(damage)
    found = listed(runs)["b/trained"]
    assert found.state == "damaged" and "trained/config.yaml" in found.problem


def test_a_number_that_no_float_holds_does_not_hide_the_other_runs(runs: Path) -> None:
    file = runs / "b" / "trained" / "evaluation.json"
    result = json.loads(file.read_text())
    result["figures"]["oracle"]["rmse"] = 10**400
    file.write_text(json.dumps(result))
    found = listed(runs)
    assert found["b/trained"].state == "damaged" and found["a_started"].state == "interrupted"


def test_a_date_that_no_calendar_has_does_not_hide_the_other_runs(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def date(path: Path) -> str:
        return datetime.fromtimestamp(1e13 if path.name == "trained" else 1).isoformat()

    monkeypatch.setattr(run_list, "_date", date)
    found = listed(runs)
    assert found["b/trained"].state == "damaged" and found["a_started"].state == "interrupted"


def test_of_a_long_log_only_the_end_is_read(runs: Path) -> None:
    log = runs / "b" / "trained" / "metrics.jsonl"
    log.write_text('{"step": 3}\n' + "damaged\n" * 20_000 + '{"step": 17}\n')
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert listed(runs)["b/trained"].steps == 17
    assert len(read_json_lines(log, 20)) == 1


def test_a_figure_that_is_no_number_is_null_in_json(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = runs / "b" / "trained" / "evaluation.json"
    result = json.loads(file.read_text())
    result["figures"]["oracle"]["rmse"] = float("nan")
    file.write_text(json.dumps(result))
    main(["runs", str(runs), "--json"])
    text = capsys.readouterr().out
    assert "NaN" not in text and json.loads(text)[1]["figure"] is None
    main(["runs", str(runs)])
    assert "rmse nan" in capsys.readouterr().out


def test_the_table_shows_odd_names_without_disturbing_the_terminal(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (runs / "b").rename(runs / "[red]\x1b[31m\n<b>")
    main(["runs", str(runs)])
    text = capsys.readouterr().out
    assert "[red]?[31m?<b>/trained" in text and "\x1b" not in text and "6 of 6" in text


def test_runs_are_sorted_by_a_column_and_what_lacks_it_comes_last(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["runs", str(runs), "--sort", "figure", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert [entry["run"] for entry in found] == ["b/trained", "a_started"]
    main(["runs", str(runs), "--json"])
    assert [entry["run"] for entry in json.loads(capsys.readouterr().out)] == ["a_started", "b/trained"]


def test_links_are_not_followed(runs: Path, oracle_dir: Path) -> None:
    (runs / "loop").symlink_to(runs)
    (runs / "elsewhere").symlink_to(oracle_dir)
    assert list(listed(runs)) == ["a_started", "b/trained"]


def test_a_missing_folder_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no such folder" in failure(capsys, "runs", tmp_path / "none")
    main(["runs", str(tmp_path)])
    assert capsys.readouterr().out.endswith(": no runs\n")
    odd = Path(f"{tmp_path}/\udcff")
    odd.mkdir()
    main(["runs", str(odd)])
    assert capsys.readouterr().out.endswith("?: no runs\n")
