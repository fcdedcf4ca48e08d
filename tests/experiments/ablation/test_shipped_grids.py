"""The shipped grids are valid and fit the devices they name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.grids import memories
from tests.support.paths import ROOT
from uvim_fsq.experiments.ablation.devices import USABLE, Devices, fit_cells
from uvim_fsq.experiments.ablation.grid import plan, read_grid


@pytest.mark.slow
def test_the_papers_grids_fit_the_devices_they_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    files = [file for file in sorted((ROOT / "configs/ablations").glob("*.yaml")) if "80 GB" in file.read_text()]
    assert len(files) == 6
    for file in files:
        cells = plan(replace(read_grid(file), seeds=(0,)), tmp_path / file.stem)
        # The last cell, for one grid: counting takes seconds.
        fitted = fit_cells([cells[0], *cells[-1:] * (file == files[0])], Devices(("0",), 80e9), 1, lambda _: None)
        for cell in fitted:
            counts = [
                int(command[-1].removeprefix("train.accumulate="))
                for command in (training.command for training in cell.trainings)
            ]
            assert counts == [16, 16], file
        # The reference's batch sizes: 1024 for the oracle, 512 for the LM.
        oracle, lm = memories(cells[0])
        assert oracle.of(1024 // 16) <= USABLE * 80e9 < oracle.of(1024 // 8)
        assert lm.of(512 // 16) <= USABLE * 80e9 < lm.of(512 // 8)


@pytest.mark.slow
def test_shipped_grids_are_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = sorted((ROOT / "configs/ablations").glob("*.yaml"))
    assert files
    monkeypatch.chdir(ROOT)
    for file in files:
        cells = plan(replace(read_grid(file), seeds=(0,)), tmp_path / file.stem)
        # Rows may share a training, but not a result.
        assert len({cell.file for cell in cells}) == len(cells), file
