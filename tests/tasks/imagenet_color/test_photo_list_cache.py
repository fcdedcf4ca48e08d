"""Long lists of photos come from the cache while no folder has changed."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

import uvim_fsq.tasks.imagenet_color.data as photos
from tests.support.photos import photo, train_tree
from uvim_fsq.tasks.imagenet_color.data import open_source

pytestmark = pytest.mark.usefixtures("own_cache")


def settle(root: Path) -> None:
    """Sets the times of all folders to one minute ago."""
    for folder in [root, *root.rglob("*")]:
        if folder.is_dir():
            os.utime(folder, ns=(then := time.time_ns() - 60_000_000_000, then))


def test_long_lists_come_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    train_tree(tmp_path / "train", 2, 6)
    assert len(open_source(str(tmp_path), "train")) == 12 and not own_cache.exists()  # too short to be cached
    monkeypatch.setattr(photos, "CACHE_ABOVE", 5)
    scans: list[Path] = []
    scan = photos._scan
    monkeypatch.setattr(photos, "_scan", lambda root: scans.append(root) or scan(root))

    def listed() -> list[str]:
        return [os.path.basename(name) for name in open_source(str(tmp_path), "train").names]

    names = listed()
    assert listed() == names and len(scans) == 2  # folders that have just changed are not cached
    settle(tmp_path)
    assert [listed() for _ in range(3)] == [names] * 3 and len(scans) == 3
    photo(tmp_path / "train" / "n00000001" / "n00000001_9.JPEG", 9)
    assert listed() == [*names, "n00000001_9.JPEG"] and len(scans) == 4
    settle(tmp_path)
    assert len(listed()) == len(listed()) == 13 and len(scans) == 5
    (tmp_path / "train" / "n00000000" / "n00000000_0.JPEG").unlink()
    assert len(listed()) == 12 and len(scans) == 6
    deep = tmp_path / "train" / "new" / "deep" / "er"
    photo(deep / "n00000009_9.JPEG", 9)
    settle(tmp_path)
    assert len(listed()) == len(listed()) == 13 and len(scans) == 7
    photo(deep / "n00000009_8.JPEG", 9)
    assert len(listed()) == 14 and len(scans) == 8
    holdouts = [open_source(str(tmp_path), "holdout").names for _ in range(2)]
    assert holdouts[0] == holdouts[1] and len(list(own_cache.glob("photo_holdout-*.npz"))) == 1
    assert len(list(own_cache.glob("photo_list-*.npz"))) == 1 and len(list(own_cache.iterdir())) == 2
