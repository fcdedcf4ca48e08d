"""A small grid of experiments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from tests.support.small import DIRECT, LM, ORACLE
from uvim_fsq.benchmark.memory import memory_of
from uvim_fsq.config.schema import LMRun, OracleRun
from uvim_fsq.experiments.ablation.grid import Cell
from uvim_fsq.performance.memory import TrainingMemory

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
    """Writes the grid and the configurations of all stages; `changes` replace keys of the grid."""
    (folder / "oracle.yaml").write_text(yaml.safe_dump(ORACLE))
    (folder / "lm.yaml").write_text(yaml.safe_dump({**LM, "oracle": "replaced"}))
    (folder / "direct.yaml").write_text(yaml.safe_dump(DIRECT))
    file = folder / "grid.yaml"
    file.write_text(yaml.safe_dump({**GRID, **changes}, sort_keys=False))
    return file


def memories(cell: Cell) -> tuple[TrainingMemory, TrainingMemory]:
    """Training memory of a cell's oracle and LM."""
    oracle, lm = (training.run for training in cell.trainings)
    assert isinstance(oracle, OracleRun) and isinstance(lm, LMRun)
    return memory_of(oracle), memory_of(oracle, lm)
