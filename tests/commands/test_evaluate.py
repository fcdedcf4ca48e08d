"""`uvim-fsq evaluate`: its result, its table, and a folder of runs."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.support.cli import failure
from uvim_fsq.cli import main


def test_a_folder_of_runs_is_refused_with_their_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], lm_dir: Path
) -> None:
    (tmp_path / "data").mkdir()
    for name in ("lm", "oracle"):
        shutil.copytree(lm_dir, tmp_path / name)
    said = failure(capsys, "evaluate", tmp_path)
    assert f"did you mean {tmp_path / 'lm'} or {tmp_path / 'oracle'}?" in said
    assert "give a run directory" in failure(capsys, "evaluate", tmp_path / "data")


def test_evaluate_writes_a_result_and_a_table_per_image(tmp_path: Path, lm_dir: Path) -> None:
    rows, result = tmp_path / "rows.csv", tmp_path / "result.json"
    main(["evaluate", str(lm_dir), "--limit", "4", "eval.batch_size=3", "--csv", str(rows), "--json", str(result)])
    found = json.loads(result.read_text())
    assert found["images"] == 4 and found["limit"] == 4 and found["protocol"] == "nyu_depth/full"
    assert found["data"]["layout"] == "B" and found["data"]["split"] == "val"
    assert found["data"]["ground_truth"] in ("raw", "filled") and len(found["checkpoint_sha256"]) == 64
    assert {"oracle", "context_only", "lm"} == set(found["figures"])
    with rows.open() as file:
        per_image = list(csv.DictReader(file))
    assert len(per_image) == 12
    mean = np.mean([float(row["rmse"]) for row in per_image if row["way"] == "lm"])
    assert abs(mean - found["figures"]["lm"]["rmse"]) < 1e-9
    assert 0 < found["figures"]["oracle"]["codebook_usage"] <= 1


def test_metrics_do_not_depend_on_the_batch_size(tmp_path: Path, lm_dir: Path) -> None:
    figures = []
    for size in (1, 6):
        file = tmp_path / f"{size}.json"
        main(["evaluate", str(lm_dir), f"eval.batch_size={size}", "eval.temperature=1.0", "--json", str(file)])
        figures.append(json.loads(file.read_text())["figures"]["lm"])
    for name, value in figures[0].items():
        assert abs(figures[1][name] - value) < 1e-5, name
