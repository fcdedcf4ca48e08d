"""Grids: products of keys, and what is refused before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.grids import write_grid
from uvim_fsq.errors import UserError
from uvim_fsq.experiments.ablation.grid import plan, read_grid


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sedes": [1]}, "unknown key 'sedes'; known: title"),
        ({"seeds": "many"}, "`seeds` must be a list of integers"),
        ({"oracle": None}, "`oracle` must name the configuration"),
        ({"rows": {"x": {"model.width": 3}}}, "`rows.x` may contain only oracle: and lm:"),
        ({"rows": {"x": {"oracle": {"model.widht": 32}}}}, "cell 'x', seed 3: .*model.widht.*did you mean"),
        ({"rows": {"x": {"oracle": {"model.width": 17}}}}, "cell 'x', seed 3: model.width=17 is not divisible"),
        ({"rows": {"x": {"lm": {"model.width": 17}}}}, "cell 'x', seed 3: model.width=17 is not divisible"),
        ({"grid": {"model.width": [16]}}, "must begin with oracle. or lm."),
        ({"grid": {"oracle.model.width": 16}}, "must be a list"),
        ({"oracle": "lm.yaml"}, "is not a configuration of stage oracle"),
        (
            {"rows": {"x": {}, "y": {"lm": {"eval.limit": 10}}}},
            "eval.limit is None in cell 'x, seed 3' and 10 in cell 'y, seed 3': their figures cannot be compared",
        ),
        (
            {"rows": {"x": {}, "y": {"oracle": {"task.protocol": "uvim"}}}},
            "task.protocol is full in cell 'x, seed 3' and uvim in cell 'y, seed 3'",
        ),
        (
            {"rows": {"x": {}, "y": {"lm": {"data.eval_split": "holdout"}}}},
            "data.eval_split is val in cell 'x, seed 3'",
        ),
        ({"rows": {"x": {}, "y": {"lm": {"data.root": "other"}}}}, "data.root is .*out/data in cell 'x.* and other in"),
    ],
)
def test_an_impossible_grid_is_refused_before_anything_runs(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    file = write_grid(tmp_path, **changes)
    with pytest.raises(UserError, match=message):
        plan(read_grid(file), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_grid_is_the_product_of_its_keys(tmp_path: Path) -> None:
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
