"""File names in COCO files, and links in prepared folders, never lead out of the data set."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from uvim_fsq.errors import UserError
from uvim_fsq.tasks.coco_panoptic import index as coco_index
from uvim_fsq.tasks.coco_panoptic.config import CocoPanopticConfig
from uvim_fsq.tasks.coco_panoptic.data import open_source, prepare
from uvim_fsq.tasks.coco_panoptic.official import ResultWriter
from uvim_fsq.tasks.coco_panoptic.segments import Segments


@pytest.mark.parametrize("part", ["images", "annotations"])
@pytest.mark.parametrize("cached", [False, True])
def test_a_coco_file_cannot_name_files_outside(
    coco_scenes: Path, tmp_path: Path, part: str, cached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UVIM_FSQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(coco_index, "CACHE_FROM", 0 if cached else 1 << 40)
    root = tmp_path / "coco"
    shutil.copytree(coco_scenes, root)
    file = root / "annotations/panoptic_val2017.json"
    tree = json.loads(file.read_text())
    for name in ("../../escaped.png", str(tmp_path / "escaped.png")):
        tree[part][1]["file_name"] = name
        file.write_text(json.dumps(tree))
        for work in (
            lambda: open_source(str(root), "val", CocoPanopticConfig()),
            lambda: prepare(str(root), lambda done, total: None),
        ):
            with pytest.raises(UserError, match="escaped.png.*lies outside of the data set"):
                work()
    assert not list(tmp_path.rglob("escaped.png"))


def test_prepared_labels_and_results_are_not_written_through_links(coco_scenes: Path, tmp_path: Path) -> None:
    root, other = tmp_path / "coco", tmp_path / "other"
    shutil.copytree(coco_scenes, root)
    other.mkdir()
    for split in ("train", "val"):
        pngs = root / f"annotations/panoptic_{split}2017"
        file = pngs.with_suffix(".json")
        tree = json.loads(file.read_text())
        (pngs / "city").mkdir()
        for annotation in tree["annotations"]:
            (pngs / annotation["file_name"]).rename(pngs / "city" / annotation["file_name"])
            annotation["file_name"] = f"city/{annotation['file_name']}"
        file.write_text(json.dumps(tree))
    folder = root / "prepared_panoptic/panoptic_train2017"
    folder.mkdir(parents=True)
    (folder / "city").symlink_to(other)
    with pytest.raises(UserError, match="city is a link that leads out of"):
        prepare(str(root), lambda done, total: None)
    assert not list(other.iterdir())
    # The whole folder may be a link, which the user has made.
    shutil.rmtree(root / "prepared_panoptic")
    (root / "prepared_panoptic").symlink_to(other)
    prepare(str(root), lambda done, total: None)
    assert len(list(other.rglob("*.png"))) == 16
    segments = Segments(np.zeros((2, 2), np.int32), np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, bool))
    writer = ResultWriter(tmp_path / "results", [1])
    writer.add(segments, 1, "city/a.png")
    assert (tmp_path / "results/panoptic/city/a.png").is_file()
    (writer.pngs / "away").symlink_to(other)
    with pytest.raises(UserError, match="away is a link that leads out of"):
        writer.add(segments, 1, "away/a.png")
