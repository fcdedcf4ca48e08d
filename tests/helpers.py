"""Shared by the tests: where the golden numbers are."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np


def golden(name: str) -> np.lib.npyio.NpzFile:
    """A file of golden numbers, from the folder UVIM_FSQ_GOLDEN names (default: tests/golden)."""
    return np.load(Path(os.environ.get("UVIM_FSQ_GOLDEN", Path(__file__).parent / "golden")) / name)
