"""`uvim-fsq ablate`: whole grids."""

from __future__ import annotations

import csv
import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.grids import write_grid
from uvim_fsq.cli import main


@pytest.mark.slow
def test_a_grid_trains_its_cells_and_writes_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = write_grid(tmp_path), tmp_path / "out"
    main(["ablate", str(file), "--out", str(out), "--dry-run"])
    said = capsys.readouterr().out
    assert said.count("uvim-fsq train-oracle") == 3 and said.count("uvim-fsq train-lm") == 3 and not out.exists()
    assert said.count("uvim-fsq synth") == 1
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

    # Finished cells are not run again; --only leaves other rows unchanged.
    main(["ablate", str(file), "--out", str(out), "--only", "FSQ", "--only", "FSQ, small LM"])
    assert "training the" not in capsys.readouterr().out
    further = write_grid(tmp_path, seeds=[3, 4])
    main(["ablate", str(further), "--out", str(out), "--only", "FSQ"])
    assert "FSQ, seed 3: training" not in (said := capsys.readouterr().out) and "FSQ, seed 4: training the lm" in said
    other = write_grid(tmp_path, set={"oracle": {"train.steps": 7}})
    with pytest.raises(SystemExit):
        main(["ablate", str(other), "--out", str(out)])
    assert "holds the results of another grid" in capsys.readouterr().err


@pytest.mark.slow
def test_a_direct_row_stands_in_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = {"FSQ": {}, "no tokens": {"direct": {"train.steps": 4}}}
    file, out = write_grid(tmp_path, direct="direct.yaml", rows=rows), tmp_path / "out"
    main(["ablate", str(file), "--out", str(out)])
    assert "no tokens, seed 3: training the direct baseline" in capsys.readouterr().out
    both, direct = json.loads((out / "results.json").read_text())["rows"]
    assert both["columns"]["direct rmse"] is None and direct["columns"]["LM rmse"] is None
    assert direct["columns"]["direct rmse"]["n"] == both["columns"]["LM rmse"]["n"] == 1
    assert len(direct["settings"]["direct"]) == 1 and (out / "direct").is_dir()
    head, _, *lines = [line for line in (out / "table.md").read_text().splitlines() if line.startswith("|")]
    column = [cell.strip() for cell in head.split("|")].index("direct rmse")
    assert [bool(line.split("|")[column].strip()) for line in lines] == [False, True]
    page = (out / "report.html").read_text()
    assert page.count("data:image/png") == 3 and "Panels: no tokens" in page


@pytest.mark.slow
def test_a_stopped_grid_ends_its_processes_and_keeps_checkpoints(tmp_path: Path) -> None:
    file, out = write_grid(tmp_path, rows={"FSQ": {"oracle": {"train.steps": 100000}}}), tmp_path / "out"
    command = [sys.executable, "-m", "uvim_fsq", "ablate", str(file), "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not any("images/s" in log.read_text() for log in out.glob("logs/*.log")) and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate()
    assert process.returncode == 130 and "interrupted" in said and "FAILED" not in said
    (log,) = out.glob("logs/*.log")
    assert "stopped by signal" in log.read_text() and list(out.glob("oracles/*/checkpoints/step_*"))
