"""Cells are fitted to the memory of a device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.grids import write_grid
from uvim_fsq.benchmark.memory import memory_of
from uvim_fsq.errors import UserError
from uvim_fsq.experiments.ablation.devices import USABLE, Devices, fit_cells
from uvim_fsq.experiments.ablation.grid import plan, read_grid


@pytest.mark.slow
def test_cells_accumulate_to_fit_a_device(tmp_path: Path) -> None:
    def accumulates(devices: Devices, jobs: int = 1, **settings: Any) -> list[str]:
        rows = {"A": {}, "B": {"lm": {"train.steps": 4}}}
        cells = plan(read_grid(write_grid(tmp_path, rows=rows, **settings)), tmp_path / "out")
        found: list[str] = []
        for cell, fitted in zip(cells, fit_cells(cells, devices, jobs, lines.append), strict=True):
            assert (fitted.oracle_dir, fitted.lm_dir) == (cell.oracle_dir, cell.lm_dir)
            found.append(" ".join(fitted.oracle_command[len(cell.oracle_command) :]))
            found.append(" ".join(fitted.lm_command[len(cell.lm_command) :]))
        return found

    lines: list[str] = []
    assert accumulates(Devices()) == ["", "", "", ""] == accumulates(Devices(("0",), 80e9)) and lines == []
    cells = plan(read_grid(write_grid(tmp_path, rows={"A": {}})), tmp_path / "out")
    oracle, lm = memory_of(cells[0].oracle_run), memory_of(cells[0].oracle_run, cells[0].lm_run)
    assert oracle.of(2) > lm.of(2)
    tight = Devices(("0", "1"), oracle.of(2) / USABLE)
    assert accumulates(tight, jobs=2) == ["train.accumulate=4", "", "train.accumulate=4", ""]
    assert len(lines) == 1 and lines[0].startswith("oracle: train.accumulate=4, because 8 images at once take")
    assert lines[0].endswith("GB available (A, seed 3 and 1 more)")
    # Two jobs on one device share its memory; the grid's own setting is a lower bound.
    assert accumulates(Devices(("0",), 2 * oracle.of(2) / USABLE), jobs=2) == accumulates(tight, jobs=2)
    assert accumulates(tight, set={"oracle": {"train.accumulate": 4}}) == ["", "", "", ""]
    assert accumulates(tight, set={"oracle": {"train.accumulate": 8}}) == ["", "", "", ""]
    with pytest.raises(UserError, match="A, seed 3: the oracle needs 2[.0-9]* GB with one image at a time"):
        accumulates(Devices(("0",), 1e9))
