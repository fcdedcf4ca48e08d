"""A small grid of experiments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from tests.support.small import LM, ORACLE

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
    """Writes the grid and its two configurations; `changes` replace keys of the grid."""
    (folder / "oracle.yaml").write_text(yaml.safe_dump(ORACLE))
    (folder / "lm.yaml").write_text(yaml.safe_dump({**LM, "oracle": "replaced"}))
    file = folder / "grid.yaml"
    file.write_text(yaml.safe_dump({**GRID, **changes}, sort_keys=False))
    return file
