"""The COCO panoptic adapter: splits, PNGs, categories, prepared labels."""

from __future__ import annotations

import json
import pickle
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.panoptic import CONFIG, edit, task_for
from uvim_fsq.data.decoded import keep_decoded
from uvim_fsq.errors import UserError
from uvim_fsq.tasks.coco_panoptic.data import PngStore, open_source, prepare
from uvim_fsq.tasks.coco_panoptic.segments import rgb_to_ids
from uvim_fsq.tasks.coco_panoptic.task import CocoPanoptic


def ids_of(root: Path, split: str) -> set[str]:
    source = open_source(str(root), split, CONFIG)
    return {source[i].id for i in range(len(source))}


def test_splits_are_disjoint_and_fixed(root: Path) -> None:
    held, rest, train = (ids_of(root, split) for split in ("holdout", "train_minus_holdout", "train"))
    assert len(held) == 1 and held | rest == train and not held & rest
    assert held == ids_of(root, "holdout") and len(ids_of(root, "val")) == 4


@pytest.mark.parametrize("place", ["annotations", "beside the photos", "zip"])
def test_pngs_are_found_in_all_three_places(root: Path, place: str) -> None:
    expected = [open_source(str(root), "val", CONFIG)[i].maps["segments"] for i in range(4)]
    pngs = root / "annotations/panoptic_val2017"
    if place == "beside the photos":
        pngs.rename(root / "panoptic_val2017")
    elif place == "zip":
        shutil.make_archive(str(pngs), "zip", pngs.parent, pngs.name)
        shutil.rmtree(pngs)
    source = pickle.loads(pickle.dumps(open_source(str(root), "val", CONFIG)))
    for i, segments in enumerate(expected):
        np.testing.assert_array_equal(source[i].maps["segments"], segments)
    assert pickle.loads(pickle.dumps(source))[0].id == source[0].id
    assert (source.unpacked_pngs() is None) == (place == "zip")


def test_zipped_pngs_are_decoded_once(root: Path, tmp_path: Path) -> None:
    pngs = root / "annotations/panoptic_val2017"
    shutil.make_archive(str(pngs), "zip", pngs.parent, pngs.name)
    shutil.rmtree(pngs)
    source = open_source(str(root), "val", CONFIG)
    with keep_decoded(str(tmp_path / "kept")):
        expected = [source[i].maps["segments"] for i in range(4)]
        source.pngs = PngStore(pngs.with_suffix(".zip"), "no such folder in the zip file/")
        for i, segments in enumerate(expected):
            np.testing.assert_array_equal(source[i].maps["segments"], segments)


def test_zipped_pngs_with_the_same_segments_are_kept_apart(root: Path, tmp_path: Path) -> None:
    pngs = root / "annotations/panoptic_val2017"
    for number, file in enumerate(sorted(pngs.iterdir())):
        ids = np.zeros((24, 32, 3), np.uint8)
        ids[number:, :, 0] = 1
        Image.fromarray(ids).save(file)
    shutil.make_archive(str(pngs), "zip", pngs.parent, pngs.name)
    shutil.rmtree(pngs)
    segment = [{"id": 1, "category_id": 1, "iscrowd": 0, "area": 1}]
    edit(root, lambda tree: [entry.update(segments_info=segment) for entry in tree["annotations"]])
    with keep_decoded(str(tmp_path / "kept")):
        source = open_source(str(root), "val", CONFIG)
        assert [int((source[i].maps["segments"] == 0).sum()) for i in range(4)] == [0, 32, 64, 96]


def test_segments_in_another_order_are_not_taken_from_decoded_files(root: Path, tmp_path: Path) -> None:
    with keep_decoded(str(tmp_path)):
        before = open_source(str(root), "val", CONFIG)[0].maps["segments"]
        edit(root, lambda tree: [entry["segments_info"].reverse() for entry in tree["annotations"]], "val")
        after = open_source(str(root), "val", CONFIG)[0].maps["segments"]
    np.testing.assert_array_equal(after, np.where(before > 0, before.max() + 1 - before, 0))


def test_ground_truth_agrees_with_the_png(root: Path) -> None:
    source = open_source(str(root), "val", CONFIG)
    tree = json.loads((root / "annotations/panoptic_val2017.json").read_text())
    for i, annotation in enumerate(tree["annotations"]):
        ids = rgb_to_ids(np.asarray(Image.open(root / "annotations/panoptic_val2017" / annotation["file_name"])))
        listed = np.array([0, *(info["id"] for info in annotation["segments_info"])])
        sample = source[i]
        np.testing.assert_array_equal(listed[sample.maps["segments"]], ids)
        categories = [c["id"] for c in tree["categories"]]
        wanted = [categories.index(info["category_id"]) + 1 for info in annotation["segments_info"]]
        assert sample.meta["segments"].classes.tolist() == wanted


def test_prepared_labels_equal_their_sources(root: Path) -> None:
    before = [open_source(str(root), "train", CONFIG)[i].maps["segments"] for i in range(12)]
    seen: list[tuple[int, int]] = []
    assert "12 train and 4 val" in prepare(str(root), lambda done, total: seen.append((done, total)))
    source = open_source(str(root), "train", CONFIG)
    assert "prepared" in source.info["layout"] and (12, 12) in seen
    for i, segments in enumerate(before):
        np.testing.assert_array_equal(source[i].maps["segments"], segments)
    edit(root, lambda tree: tree["annotations"].pop(), "train")
    with pytest.raises(UserError, match="prepared from a different"):
        open_source(str(root), "train", CONFIG)


def test_categories_come_from_the_file_and_must_agree(root: Path) -> None:
    task = task_for(root)
    assert [name for _, name, _ in task.config.categories] == task.names[1:]
    assert task.label_channels["semantics"].num_classes == len(task.names)
    edit(root, lambda tree: tree["categories"][0].update(name="another"))
    with pytest.raises(UserError, match="different categories"):
        task.source(str(root), "val")
    with pytest.raises(UserError, match="categories is empty"):
        CocoPanoptic(CONFIG)


def test_many_segments_are_counted_and_warned_of(root: Path) -> None:
    with pytest.warns(UserWarning, match="more than 2 segments"):
        source = open_source(str(root), "val", replace(CONFIG, max_instances=2))
    assert source.info["images_over_2_segments"] >= 1
    task = task_for(root, max_instances=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sample = task.source(str(root), "val")[0]
    assert set(np.unique(task.encode(sample)["instances"])) <= {-1, 0, 1, 2}
