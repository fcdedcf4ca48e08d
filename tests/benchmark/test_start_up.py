"""Time and memory of start-up, in processes of their own."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.support.benchmark import by_name
from uvim_fsq.benchmark import predicting, start_up
from uvim_fsq.benchmark.start_up import measure_start_up
from uvim_fsq.cli import main
from uvim_fsq.config.plugins import trusting
from uvim_fsq.errors import UserError


@pytest.mark.slow
def test_each_stage_takes_longer_and_more_memory_than_the_one_before(tmp_path: Path, lm_dir: Path) -> None:
    file = tmp_path / "result.json"
    main(["benchmark", "start-up", str(lm_dir), "--repeats", "1", "--json", str(file)])
    lines = json.loads(file.read_text())["measurements"]
    assert [line["name"] for line in lines[::2]] == [f"start-up: {stage}" for stage in start_up.STAGES]
    assert [line["name"] for line in lines[1::2]] == [f"start-up: {stage}, memory" for stage in start_up.STAGES]
    assert {line["unit"] for line in lines[::2]} == {"ms"} and {line["unit"] for line in lines[1::2]} == {"MB"}
    memory = [line["value"] for line in lines[1::2]]
    # Python and the package are small; torch is not.
    assert memory[0] <= memory[1] < 60 and 150 < memory[2] < memory[3] < memory[4]


def test_without_a_run_only_imports_are_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(start_up.STAGES, "from uvim_fsq import Predictor", "import json")  # fast
    lines = by_name(measure_start_up(None, (), tmp_path, repeats=1))
    assert len(lines) == 2 * start_up.WITHOUT_RUN and "start-up: import uvim_fsq" in lines


def test_only_the_stage_itself_counts_not_the_end_of_the_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ends_late = "import atexit, time; atexit.register(time.sleep, 3)"
    monkeypatch.setattr(start_up, "STAGES", {"late": ends_late})
    assert measure_start_up(None, (), tmp_path, repeats=1)[0].value < 2500


def test_a_process_that_fails_is_one_line_with_its_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(start_up, "STAGES", {"broken": "raise OSError('the disk is gone')"})
    with pytest.raises(UserError, match=r"a process failed \(OSError: the disk is gone\)"):
        measure_start_up(None, (), tmp_path, repeats=1)


@pytest.mark.usefixtures("no_trusted_plugins")
def test_what_this_process_trusts_the_processes_it_measures_trust_too(monkeypatch: pytest.MonkeyPatch) -> None:
    check = "from uvim_fsq.config.plugins import trusts_runs; assert trusts_runs(), 'no trust'"
    monkeypatch.setattr(start_up, "STAGES", {"check": check})
    for measured in (
        lambda: measure_start_up(None, (), Path(), repeats=1),
        lambda: predicting._seconds([sys.executable, "-c", check]),
    ):
        with pytest.raises(UserError, match="no trust"):
            measured()
        with trusting():
            measured()


@pytest.mark.slow
@pytest.mark.parametrize("job", ["start-up", "predict"])
def test_the_run_of_an_oracle_is_refused(job: str, oracle_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["benchmark", job, str(oracle_dir)])
    assert "needs a run that predicts" in capsys.readouterr().err
