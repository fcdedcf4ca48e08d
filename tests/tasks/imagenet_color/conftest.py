"""Fixtures of the colorization tests."""

from __future__ import annotations

from pathlib import Path

import pytest

import uvim_fsq.tasks.imagenet_color.task as task_module
from tests.support.inception import FakeInception
from uvim_fsq.synthetic.writers import write_dataset


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> list[tuple[int, ...]]:
    monkeypatch.setattr(task_module, "Inception", FakeInception)
    FakeInception.calls = []
    return FakeInception.calls


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """12 training and 5 validation photos of 32 x 24, named as ImageNet's."""
    write_dataset("imagenet", tmp_path / "in", 12, (24, 32), num_val=5, workers=1)
    return tmp_path / "in"
