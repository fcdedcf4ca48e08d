"""Fixtures of the panoptic tests."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def root(coco_scenes: Path, tmp_path: Path) -> Path:
    """A copy of the small COCO data set that a test may change."""
    return Path(shutil.copytree(coco_scenes, tmp_path / "coco"))
