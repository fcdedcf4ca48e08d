"""Cityscapes and ADE20K in their own layouts: photos, annotations, classes, colors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.panoptic import CONFIG, task_for
from tests.support.panoptic_layouts import photo, write_ade20k, write_cityscapes
from uvim_fsq.commands.data_check import check_data
from uvim_fsq.errors import UserError
from uvim_fsq.tasks.coco_panoptic.convert import CITYSCAPES, convert
from uvim_fsq.tasks.coco_panoptic.data import open_source


@pytest.fixture
def cityscapes(tmp_path: Path) -> Path:
    write_cityscapes(tmp_path / "cityscapes")
    convert(str(tmp_path / "cityscapes"), None, lambda done, total: None)
    return tmp_path / "cityscapes"


def test_cityscapes_photos_are_found_in_the_folders_of_their_cities(cityscapes: Path) -> None:
    source = open_source(str(cityscapes), "train", CONFIG)
    samples = [source[i] for i in range(len(source))]
    assert [s.id for s in samples] == [
        f"{c}/{c}_00000{i}_000019_leftImg8bit.png" for i, c in enumerate(("aachen", "ulm"))
    ]
    for sample in samples:
        np.testing.assert_array_equal(sample.image, Image.open(cityscapes / "leftImg8bit/train" / sample.id))
    lines, ok = check_data("coco_panoptic", str(cityscapes))
    assert ok and "layout Cityscapes panoptic, 2 images, official 2975: DIFFERS" in lines[0]
    assert "classes 19" in lines[0]


def test_classes_things_and_colors_are_those_of_the_file(cityscapes: Path) -> None:
    task = task_for(cityscapes)
    assert task.config.categories == tuple((i, name, bool(thing)) for i, name, _, thing, _ in CITYSCAPES)
    np.testing.assert_array_equal(task.palette[1:], [color for *_, color in CITYSCAPES])
    assert not task.palette[0].any()
    legend = task.legend().reshape(-1, 3)
    assert all((legend == color).all(1).any() for *_, color in CITYSCAPES)
    for file in (cityscapes / "gtFine").glob("*.json"):
        tree = json.loads(file.read_text())
        tree["categories"] = [{**c, "color": [300, 0, 0]} for c in tree["categories"]]
        file.write_text(json.dumps(tree))
    assert task_for(cityscapes).config.colors == () and len(task_for(cityscapes).palette) == 20
    with pytest.raises(UserError, match="task.colors"):
        task_for(cityscapes, categories=((1, "a", True),), colors=((0, 0, 256),))


def test_train_ids_are_read_where_there_is_nothing_else(cityscapes: Path) -> None:
    folder = cityscapes / "gtFine"
    shutil.copytree(folder / "cityscapes_panoptic_val", folder / "cityscapes_panoptic_val_trainId")
    file = folder / "cityscapes_panoptic_val.json"
    tree = json.loads(file.read_text())
    number = {c["id"]: i for i, c in enumerate(tree["categories"])}
    for entry in tree["categories"]:
        entry["id"] = number[entry["id"]]
    for info in tree["annotations"][0]["segments_info"]:
        info["category_id"] = number[info["category_id"]]
    (folder / "cityscapes_panoptic_val_trainId.json").write_text(json.dumps(tree))
    before = open_source(str(cityscapes), "val", CONFIG)
    assert before.annotations == file
    file.unlink()
    after = open_source(str(cityscapes), "val", CONFIG)
    assert after.index.categories[0] == (0, "road", False)
    np.testing.assert_array_equal(after[0].meta["segments"].classes, before[0].meta["segments"].classes)


def test_a_cityscapes_image_id_cannot_lead_outside(cityscapes: Path) -> None:
    file = cityscapes / "gtFine/cityscapes_panoptic_val.json"
    file.write_text(file.read_text().replace('"lindau_000002_000019"', '"../../x_000002_000019"'))
    with pytest.raises(UserError, match="lies outside of the data set"):
        open_source(str(cityscapes), "val", CONFIG)


def test_ade20k_is_read_as_the_common_recipe_writes_it(tmp_path: Path) -> None:
    root = tmp_path / "ADEChallengeData2016"
    write_ade20k(root)
    convert(str(root), None, lambda done, total: None)
    lines, ok = check_data("coco_panoptic", str(root))
    assert ok and "layout ADE20K panoptic, 2 images, official 20210: DIFFERS" in lines[0] and "classes 150" in lines[0]
    source = open_source(str(root), "val", CONFIG)
    assert source[0].id == "ADE_val_00000001.jpg" and source.photos == root / "images/validation"
    assert source.index.is_thing.sum() == 100


def test_areas_of_stuff_before_things_were_laid_over_it_are_no_fault(tmp_path: Path) -> None:
    """MaskFormer's script counts stuff first, and lists it also where things cover all of it."""
    write_ade20k(tmp_path)
    convert(str(tmp_path), None, lambda done, total: None)
    for split in ("train", "val"):
        file = tmp_path / f"ade20k_panoptic_{split}.json"
        tree = json.loads(file.read_text())
        for entry in tree["annotations"]:
            for info in entry["segments_info"]:
                info["area"] += 7 * (not tree["categories"][info["category_id"]]["isthing"])
            entry["segments_info"].append({"id": 1 << 20, "category_id": 1, "area": 5, "iscrowd": 0})
        file.write_text(json.dumps(tree))
    assert check_data("coco_panoptic", str(tmp_path))[1]


def test_labels_that_are_not_converted_are_recognized(tmp_path: Path) -> None:
    write_cityscapes(tmp_path)
    with pytest.raises(UserError, match="original labels of Cityscapes.*run: uvim-fsq data convert .* --task coco_pan"):
        open_source(str(tmp_path), "val", CONFIG)


def test_converted_labels_may_lie_apart_from_the_photos(tmp_path: Path) -> None:
    root, out = tmp_path / "ade", tmp_path / "labels"
    write_ade20k(root)
    convert(str(root), out, lambda done, total: None)
    config = CONFIG.__class__(image_dir=str(root / "images/{split}"))
    with pytest.raises(UserError, match="image_dir=.*images/val is not a folder"):
        open_source(str(out), "val", CONFIG.__class__(image_dir=f"{root}/images/val"))
    (root / "images/train").mkdir()
    assert open_source(str(out), "val", config)[0].id == "ADE_val_00000001.jpg"
    photo(root / "images/train" / "ADE_train_00000001.jpg")
    assert open_source(str(out), "train", config)[0].image.shape == (24, 32, 3), "the exact name is preferred"
