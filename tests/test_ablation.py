"""Grids: what they refuse before anything runs, sharing, failing cells, restarting, and the tables."""

from __future__ import annotations

import csv
import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.small import LM, ORACLE
from uvim_fsq import ablation_report
from uvim_fsq.ablation import plan, read_grid
from uvim_fsq.cli import main
from uvim_fsq.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
GRID: dict[str, Any] = {
    "title": "a test",
    "oracle": "oracle.yaml",
    "lm": "lm.yaml",
    "synthetic": {"format": "nyu", "num": 16, "num_val": 6, "size": [24, 32], "layout": "h5", "workers": 1},
    "rows": {
        "FSQ": {"paper": "0.473"},
        "FSQ, small LM": {"lm": {"train.steps": 4}},
        "too large a batch": {"oracle": {"train.batch_size": 1000}},
    },
    "seeds": [3],
}


def write_grid(folder: Path, **changes: Any) -> Path:
    (folder / "oracle.yaml").write_text(yaml.safe_dump(ORACLE))
    (folder / "lm.yaml").write_text(yaml.safe_dump({**LM, "oracle": "replaced"}))
    file = folder / "grid.yaml"
    file.write_text(yaml.safe_dump({**GRID, **changes}, sort_keys=False))
    return file


def test_a_grid_from_beginning_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = write_grid(tmp_path), tmp_path / "out"
    main(["ablate", str(file), "--out", str(out), "--dry-run"])
    said = capsys.readouterr().out
    assert said.count("uvim-fsq train-oracle") == 3 and said.count("uvim-fsq train-lm") == 3 and not out.exists()
    with pytest.raises(SystemExit) as caught:
        main(["ablate", str(file), "--out", str(out), "--jobs", "2"])
    assert caught.value.code == 1
    said = capsys.readouterr().out
    assert "train.batch_size=1000 exceeds the 16 training samples" in said and said.count(": done") == 2
    assert len(list((out / "oracles").iterdir())) <= 2 and len(list((out / "lms").iterdir())) == 2  # one oracle shared
    results = json.loads((out / "results.json").read_text())
    first, second, failed = results["rows"]
    assert first["columns"]["oracle rmse"] == second["columns"]["oracle rmse"] and failed["cells"] == []
    assert first["columns"]["LM rmse"]["n"] == 1 and math.isfinite(first["columns"]["bits per token"]["mean"])
    bits = first["columns"]["bits per image"]["mean"] / first["columns"]["bits per token"]["mean"]
    assert bits == pytest.approx(4)  # tokens
    assert "too large a batch, seed 3" in results["failures"]
    assert "| FSQ | " in (out / "table.md").read_text() and "Failed: too large" in (out / "table.md").read_text()
    with (out / "table.csv").open() as lines:
        assert {line["row"] for line in csv.DictReader(lines)} == {"FSQ", "FSQ, small LM"}
    page = (out / "report.html").read_text()
    assert page.count("data:image/png") == 3 and "Failed" in page

    # Finished cells are not run again; a chosen row leaves the others as they are.
    main(["ablate", str(file), "--out", str(out), "--only", "FSQ", "--only", "FSQ, small LM"])
    assert "training the" not in capsys.readouterr().out
    further = write_grid(tmp_path, seeds=[3, 4])
    main(["ablate", str(further), "--out", str(out), "--only", "FSQ"])
    assert "FSQ, seed 3: training" not in (said := capsys.readouterr().out) and "FSQ, seed 4: training the lm" in said
    other = write_grid(tmp_path, set={"oracle": {"train.steps": 7}})
    with pytest.raises(SystemExit):
        main(["ablate", str(other), "--out", str(out)])
    assert "holds the results of another grid" in capsys.readouterr().err


def test_a_stopped_grid_ends_its_processes_and_goes_on_later(tmp_path: Path) -> None:
    file, out = write_grid(tmp_path, rows={"FSQ": {"oracle": {"train.steps": 100000}}}), tmp_path / "out"
    command = [sys.executable, "-m", "uvim_fsq", "ablate", str(file), "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for _ in range(600):
        if any("images/s" in log.read_text() for log in out.glob("logs/*.log")):
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted" in said and "FAILED" not in said
    (log,) = out.glob("logs/*.log")
    assert "stopped by signal" in log.read_text() and list(out.glob("oracles/*/checkpoints/step_*"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sedes": [1]}, "unknown key 'sedes'; known: title"),
        ({"seeds": "many"}, "`seeds` must be a list of integers"),
        ({"oracle": None}, "`oracle` must name the configuration"),
        ({"rows": {"x": {"model.width": 3}}}, "`rows.x` may hold only oracle: and lm:"),
        ({"rows": {"x": {"oracle": {"model.widht": 32}}}}, "cell 'x', seed 3: .*model.widht.*did you mean"),
        ({"rows": {"x": {"oracle": {"model.width": 17}}}}, "cell 'x', seed 3: model.width=17 is not divisible"),
        ({"rows": {"x": {"lm": {"model.width": 17}}}}, "cell 'x', seed 3: model.width=17 is not divisible"),
        ({"grid": {"model.width": [16]}}, "begins with oracle. or lm."),
        ({"grid": {"oracle.model.width": 16}}, "a list of values"),
        ({"oracle": "lm.yaml"}, "is no configuration of stage oracle"),
    ],
)
def test_impossible_grids_are_named_before_anything_runs(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    file = write_grid(tmp_path, **changes)
    with pytest.raises(UserError, match=message):
        plan(read_grid(file), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_products_of_keys(tmp_path: Path) -> None:
    grid = {"oracle.model.quantizer.levels": ["2^8", [5, 5]], "lm.model.depth": [1, 2]}
    read = read_grid(write_grid(tmp_path, grid=grid, rows={"A": {}, "B": {"oracle": {"model.code_length": 1}}}))
    assert [row.name for row in read.rows[:4]] == [
        "A, levels=2^8, depth=1", "A, levels=2^8, depth=2", "A, levels=[5,5], depth=1", "A, levels=[5,5], depth=2",
    ]  # fmt: skip
    assert read.rows[-1].oracle == ("model.code_length=1", "model.quantizer.levels=[5,5]")
    cells = plan(read, tmp_path / "out")
    assert len({cell.oracle_dir for cell in cells}) == 4 and len({cell.lm_dir for cell in cells}) == 8
    moved = plan(read, tmp_path / "elsewhere")
    assert [cell.lm_dir.name for cell in moved] == [cell.lm_dir.name for cell in cells]


def test_mean_and_deviation_over_seeds() -> None:
    entries = [{"figures": {"lm": {"rmse": value}}} for value in (1.0, 2.0, 4.0)]
    summary = ablation_report._summary(entries, "lm", "rmse")
    assert summary == {"mean": pytest.approx(7 / 3), "std": pytest.approx(math.sqrt(7 / 3)), "n": 3}
    assert ablation_report._format(summary) == "2.333 ± 1.528"
    assert ablation_report._summary(entries[:1], "lm", "rmse") == {"mean": 1.0, "std": None, "n": 1}
    assert ablation_report._summary(entries, "oracle", "rmse") is None


def test_shipped_grids_are_possible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = sorted((ROOT / "configs/ablations").glob("*.yaml"))
    assert files
    monkeypatch.chdir(ROOT)
    for file in files:
        cells = plan(read_grid(file), tmp_path / file.stem)
        assert len({cell.lm_dir for cell in cells}) == len(cells), file
