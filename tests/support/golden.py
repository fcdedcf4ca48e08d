"""Golden numbers of the reference. Only files named test_golden_*.py import this module."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch

from tests.support.paths import ROOT


def golden_path(name: str) -> Path:
    """A file in the folder that UVIM_FSQ_GOLDEN names (default: tests/golden)."""
    return Path(os.environ.get("UVIM_FSQ_GOLDEN", ROOT / "tests" / "golden")) / name


def golden(name: str) -> np.lib.npyio.NpzFile:
    """A file of golden numbers."""
    return np.load(golden_path(name))


def golden_checkpoint(name: str) -> tuple[dict[str, torch.Tensor], dict[str, np.ndarray]]:
    """A golden file's published-style checkpoint, and all other arrays of the file."""
    arrays = dict(golden(name))
    ours = {key for key in arrays if key.startswith(("params/", "state/"))}
    tensors = {key.removeprefix("params/"): torch.tensor(arrays[key], dtype=torch.float32) for key in ours}
    return tensors, {key: value for key, value in arrays.items() if key not in ours}
