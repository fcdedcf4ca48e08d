"""The table of per-image results."""

from __future__ import annotations

import csv
from pathlib import Path

from uvim_fsq.evaluation import run as evaluation
from uvim_fsq.evaluation.run import write_rows


def test_csv_cells_cannot_be_formulas(tmp_path: Path) -> None:
    names = ["=HYPERLINK(1)", "+1", "-1", "@SUM(1)", "\tx", "\rx", "a=1", "", "a,b\nc"]
    rows = {"lm": [{"id": name, "rmse": -1.5, "n": 3} for name in names], "=cmd": [{"id": "a", "pq": 0.25}]}
    write_rows(tmp_path / "a.csv", rows)
    with (tmp_path / "a.csv").open(newline="") as file:
        read = list(csv.DictReader(file))
    assert [row["id"] for row in read] == [*(f"'{name}" for name in names[:6]), *names[6:], "a"]
    assert read[0] == {"way": "lm", "id": "'=HYPERLINK(1)", "rmse": "-1.5", "n": "3", "pq": ""}
    assert read[-1] == {"way": "'=cmd", "id": "a", "rmse": "", "n": "", "pq": "0.25"}


def test_rows_with_different_metrics_share_a_table(tmp_path: Path) -> None:
    rows = {"a": [{"id": "1", "x": 0.5}, {"id": "2", "y": 2}], "b": []}
    evaluation.write_rows(tmp_path / "rows.csv", rows)
    evaluation.write_rows(tmp_path / "rows.csv", rows)
    assert (tmp_path / "rows.csv").read_text().split() == ["way,id,x,y", "a,1,0.5,", "a,2,,2"]
