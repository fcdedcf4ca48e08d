"""The tables of a grid: which results may share one, and damaged results."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support.grids import write_grid
from uvim_fsq.errors import UserError
from uvim_fsq.experiments.ablation import report as ablation_report
from uvim_fsq.experiments.ablation.grid import Cell, Grid, claim, plan, read_grid


def test_mean_and_deviation_over_seeds() -> None:
    entries = [{"figures": {"lm": {"rmse": value}}} for value in (1.0, 2.0, 4.0)]
    summary = ablation_report._summary(entries, "lm", "rmse")
    assert summary == {"mean": pytest.approx(7 / 3), "std": pytest.approx(math.sqrt(7 / 3)), "n": 3}
    assert ablation_report._format(summary) == "2.333 ± 1.528"
    assert ablation_report._summary(entries[:1], "lm", "rmse") == {"mean": 1.0, "std": None, "n": 1}
    assert ablation_report._summary(entries, "oracle", "rmse") is None


def test_a_damaged_result_is_left_out_of_the_table(tmp_path: Path, lm_dir: Path) -> None:
    grid = read_grid(write_grid(tmp_path, rows={"FSQ": {}}))
    out = tmp_path / "out"
    claim(out, grid, ["train.steps=3"])
    claim(out, grid, ["train.steps=3"])
    with pytest.raises(UserError, match="holds the results of another grid"):
        claim(out, grid, [])
    for text in ("", "[", "[1]"):
        (out / "grid.json").write_text(text)
        with pytest.raises(UserError, match="grid.json is damaged .*; delete it if"):
            claim(out, grid, ["train.steps=3"])
    (cell,) = plan(grid, out)
    shutil.copytree(lm_dir, cell.result.folder)
    assert ablation_report.collect(grid, [cell], {})["rows"][0]["columns"]["LM rmse"]["n"] == 1
    (cell.result.folder / "evaluation.json").write_text("")
    results = ablation_report.write_tables(out, grid, [cell], {})
    assert results["rows"][0]["cells"] == [] and "0 images" in (out / "table.md").read_text()


def with_results(out: Path, grid: Grid, source: Path, *changes: dict[str, Any]) -> list[Cell]:
    """The cells of a grid, each finished with the result of `source`, changed by its entry of `changes`."""
    cells = plan(grid, out)
    result = json.loads((source / "evaluation.json").read_text())
    for cell, change in zip(cells, changes, strict=True):
        cell.result.folder.mkdir(parents=True)
        data = {**result["data"], **change.get("data", {})}
        (cell.result.folder / "evaluation.json").write_text(json.dumps({**result, **change, "data": data}))
    return cells


WHOLE: dict[str, Any] = {"images": 654, "data": {"count": 654, "official_count": 654}}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"protocol": "nyu_depth/eigen"},
            "protocol is nyu_depth/full in cell 'A, seed 3' and nyu_depth/eigen in cell 'B",
        ),
        ({"limit": 10, "images": 10}, "images is 654 in cell 'A, seed 3' and 10 in cell 'B, seed 3'"),
        ({"limit": 654}, "limit is None in cell 'A, seed 3' and 654 in cell 'B, seed 3'"),
        ({"data": {"count": 600, "official_count": 654}}, "data.count is 654 in cell 'A, seed 3' and 600 in cell"),
        ({"data": {**WHOLE["data"], "split": "train"}}, "data.split is val in cell 'A, seed 3' and train in cell"),
        ({"main_metric": "pq"}, "main_metric is rmse"),
    ],
)
def test_results_of_different_images_or_protocols_share_no_table(
    tmp_path: Path, lm_dir: Path, change: dict[str, Any], said: str
) -> None:
    grid = read_grid(write_grid(tmp_path, rows={"A": {}, "B": {"lm": {"train.steps": 4}}}))
    cells = with_results(tmp_path / "out", grid, lm_dir, WHOLE, {**WHOLE, **change})
    with pytest.raises(UserError) as caught:
        ablation_report.write_tables(tmp_path / "out", grid, cells, {})
    assert said in str(caught.value) and f"uvim-fsq evaluate {cells[0].result.folder}" in str(caught.value)
    assert not (tmp_path / "out" / "table.md").exists()


@pytest.mark.parametrize(
    ("change", "paper", "caption"),
    [
        ({}, True, "`nyu_depth/full`, 654 images;"),
        ({"limit": 10, "images": 10}, False, "`nyu_depth/full`, the first 10 images only;"),
        ({"limit": 654}, False, "`nyu_depth/full`, the first 654 images only;"),
        ({"images": 640}, False, "`nyu_depth/full`, 640 images;"),
        ({"images": 600, "data": {"count": 600, "official_count": 654}}, False, "`nyu_depth/full`, 600 images;"),
        ({"protocol": "nyu_depth/uvim"}, False, "`nyu_depth/uvim`, 654 images;"),
        ({"data": {**WHOLE["data"], "root": "moved", "image_size": 32}}, True, "`nyu_depth/full`, 654 images;"),
    ],
)
def test_paper_values_are_shown_only_for_the_papers_protocol_and_images(
    tmp_path: Path, lm_dir: Path, change: dict[str, Any], paper: bool, caption: str
) -> None:
    rows = {"A": {"paper": "0.473"}, "B": {"lm": {"train.steps": 4}}}
    grid = read_grid(write_grid(tmp_path, rows=rows, paper_protocol="nyu_depth/full"))
    cells = with_results(tmp_path / "out", grid, lm_dir, {**WHOLE, **change}, {**WHOLE, **change})
    ablation_report.write_tables(tmp_path / "out", grid, cells, {})
    text = (tmp_path / "out" / "table.md").read_text()
    assert caption in text and ("0.473" in text) == paper
