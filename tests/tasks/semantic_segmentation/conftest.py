"""A data set of synthetic scenes, shared by these tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from uvim_fsq.synthetic.writers import write_dataset


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """10 + 3 rooms of 24 x 32 with class PNGs; tests that change it copy it."""
    root = tmp_path_factory.mktemp("semantic") / "rooms"
    write_dataset("semantic", root, 10, (24, 32), num_val=3, workers=1)
    return root
