"""Cells are fitted to the memory of a device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.grids import memories, write_grid
from uvim_fsq.benchmark.memory import memory_of
from uvim_fsq.config.schema import DirectRun
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
            for before, after in zip(cell.trainings, fitted.trainings, strict=True):
                assert before.folder == after.folder
                found.append(" ".join(after.command[len(before.command) :]))
        return found

    lines: list[str] = []
    assert accumulates(Devices()) == ["", "", "", ""] == accumulates(Devices(("0",), 80e9)) and lines == []
    cells = plan(read_grid(write_grid(tmp_path, rows={"A": {}})), tmp_path / "out")
    oracle, lm = memories(cells[0])
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


@pytest.mark.slow
def test_a_direct_row_accumulates_too(tmp_path: Path) -> None:
    cells = plan(read_grid(write_grid(tmp_path, direct="direct.yaml", rows={"A": {"direct": {}}})), tmp_path / "out")
    (training,) = cells[0].trainings
    assert isinstance(training.run, DirectRun)
    room = memory_of(training.run).of(2) / USABLE
    lines: list[str] = []
    ((fitted,),) = (cell.trainings for cell in fit_cells(cells, Devices(("0",), room), 1, lines.append))
    assert fitted.command == (*training.command, "train.accumulate=4")
    assert lines[0].startswith("direct baseline: train.accumulate=4, because 8 images at once take")
