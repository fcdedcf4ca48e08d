"""Damaged or unusual data sets in the COCO panoptic format."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.support.panoptic import CONFIG, edit, task_for
from uvim_fsq.commands.data_check import check_data
from uvim_fsq.errors import UserError
from uvim_fsq.tasks.coco_panoptic.data import open_source, prepare
from uvim_fsq.tasks.coco_panoptic.official import ResultWriter


def first_png(root: Path) -> Path:
    return sorted((root / "annotations/panoptic_val2017").glob("*.png"))[0]


def break_png(root: Path, kind: str) -> None:
    png = first_png(root)
    if kind == "missing":
        png.unlink()
    elif kind == "text":
        png.write_text("not a picture")
    elif kind == "gray":
        Image.fromarray(np.zeros((24, 32), np.uint8)).save(png)
    elif kind == "16-bit":
        Image.fromarray(np.zeros((24, 32), np.uint16)).save(png)
    elif kind == "size":
        Image.fromarray(np.zeros((20, 32, 3), np.uint8)).save(png)
    elif kind == "stranger":
        Image.fromarray(np.full((24, 32, 3), 7, np.uint8)).save(png)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "no such PNG, but the annotation file lists it"),
        ("text", "cannot be read as a PNG"),
        ("gray", "panoptic PNGs are 8-bit RGB"),
        ("16-bit", "16-bit"),
        ("size", "24 x 32 but its PNG .* 20 x 32"),
        ("stranger", "does not list, e.g. 460551"),
    ],
)
def test_a_broken_png_is_named(root: Path, kind: str, message: str) -> None:
    break_png(root, kind)
    with pytest.raises(UserError, match=message):
        open_source(str(root), "val", CONFIG)[0]
    lines, ok = check_data("coco_panoptic", str(root))
    assert not ok and sum("val: " in line for line in lines) == 2 and "\n" not in "".join(lines)


def first_segments(tree: dict[str, Any]) -> list[dict[str, Any]]:
    return tree["annotations"][0]["segments_info"]


def repeat_id(tree: dict[str, Any]) -> None:
    first_segments(tree)[1]["id"] = first_segments(tree)[0]["id"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (repeat_id, "appears twice"),
        (lambda tree: first_segments(tree)[0].update(category_id=77), "category 77, which `categories` does not list"),
        (lambda tree: first_segments(tree)[0].update(id=1 << 24), "segment id 16777216, outside of 1..16777215"),
        (lambda tree: first_segments(tree)[0].update(id=-5), "segment id -5, outside of 1..16777215"),
        (lambda tree: first_segments(tree)[0].update(iscrowd="no"), "`iscrowd` is 'no', expected 0 or 1"),
        (lambda tree: tree["categories"][0].update(isthing="false"), "`isthing` is 'false', expected 0 or 1"),
        (
            lambda tree: tree["images"][1].update(file_name=tree["images"][0]["file_name"]),
            "2 entries of `images` name the file 0000.*jpg",
        ),
        (
            lambda tree: tree["annotations"][1].update(file_name=tree["annotations"][0]["file_name"]),
            "2 entries of `annotations` name the file 0000.*png",
        ),
        (lambda tree: tree["annotations"].append(tree["annotations"][0]), "repeat an image_id"),
        (lambda tree: tree["images"].pop(0), "images missing from `images`"),
        (lambda tree: tree["annotations"][0].pop("segments_info"), "missing or invalid field"),
        (lambda tree: tree.pop("categories"), "needs the lists images, annotations, categories"),
        (lambda tree: tree.update(annotations=[]), "holds no annotations"),
        (lambda tree: first_segments(tree)[0].update(id="one"), "missing or invalid field"),
        (lambda tree: first_segments(tree)[0].update(area="large"), "missing or invalid field"),
        (
            lambda tree: [s.update(category_id=77) for a in tree["annotations"] for s in a["segments_info"]],
            r"category 77.*\(and 3 more invalid annotations",
        ),
    ],
)
def test_a_broken_annotation_file_is_named(root: Path, change: Any, message: str) -> None:
    edit(root, change)
    with pytest.raises(UserError, match=message) as caught:
        open_source(str(root), "val", CONFIG)
    assert "\n" not in str(caught.value)


def test_image_ids_may_be_text_and_optional_fields_may_be_missing(root: Path, tmp_path: Path) -> None:
    """Cityscapes has text as image ids; some files lack sizes and areas, or give two categories the same name."""
    truth = open_source(str(root), "val", CONFIG)[0].meta["segments"]

    def change(tree: dict[str, Any]) -> None:
        for image in tree["images"]:
            image["id"] = f"city_{image['id']}"
            del image["height"], image["width"]
        for annotation in tree["annotations"]:
            annotation["image_id"] = f"city_{annotation['image_id']}"
            for info in annotation["segments_info"]:
                info["area"] = None
        for category in tree["categories"][:2]:
            category["name"] = "same"

    edit(root, change)
    source = open_source(str(root), "val", CONFIG)
    sample = source[0]
    np.testing.assert_array_equal(sample.meta["segments"].ids, truth.ids)
    assert isinstance(sample.meta["image_id"], str) and set(sample.meta["areas"]) == {-1}
    names = [name for _, name, _ in source.index.categories]
    assert len(set(names)) == len(names) and names[0].startswith("same (")
    writer = ResultWriter(tmp_path / "out", [category[0] for category in source.index.categories])
    entry = writer.add(sample.meta["segments"], sample.meta["image_id"], sample.meta["png"])
    assert json.loads(writer.finish([entry]).read_text())["annotations"][0]["image_id"] == sample.meta["image_id"]


def zip_pngs(root: Path, compression: int) -> Path:
    folder = root / "annotations/panoptic_val2017"
    with zipfile.ZipFile(folder.with_suffix(".zip"), "w", compression) as archive:
        for png in sorted(folder.glob("*.png")):
            archive.write(png, f"panoptic_val2017/{png.name}")
    shutil.rmtree(folder)
    return folder.with_suffix(".zip")


def test_a_damaged_zip_member_is_named(root: Path) -> None:
    archive = zip_pngs(root, zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(archive) as file:
        first = file.infolist()[0]
    data = bytearray(archive.read_bytes())
    start = first.header_offset + 30 + len(first.filename)
    data[start : start + first.compress_size] = bytes(reversed(data[start : start + first.compress_size]))
    archive.write_bytes(bytes(data))
    lines, ok = check_data("coco_panoptic", str(root))
    assert not ok and any("cannot be read" in line and "replace it" in line for line in lines)


def test_a_zip_is_reopened_after_a_fork(root: Path) -> None:
    zip_pngs(root, zipfile.ZIP_STORED)
    source = open_source(str(root), "val", CONFIG)
    whole = [source[i].meta["segments"].ids for i in range(len(source))]
    before = source.pngs._zip
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        again = all(np.array_equal(source[i].meta["segments"].ids, ids) for i, ids in enumerate(whole))
        os.write(writer, b"y" if again and source.pngs._zip is not before else b"n")
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reader, 1) == b"y"


def test_val_alone_can_be_checked(root: Path) -> None:
    (root / "annotations/panoptic_train2017.json").unlink()
    lines, ok = check_data("coco_panoptic", str(root))
    assert not ok and lines[0].startswith("train: ") and "holds no annotations/panoptic_train" in lines[0]
    assert any(line.startswith("val: all files readable") for line in lines)


def test_prepared_labels_of_another_order_are_refused(root: Path) -> None:
    prepare(str(root), lambda done, total: None)

    def turn(tree: dict[str, Any]) -> None:
        for annotation in tree["annotations"]:
            annotation["segments_info"].reverse()

    edit(root, turn)
    with pytest.raises(UserError, match="was prepared from a different panoptic_val2017.json; delete that folder"):
        open_source(str(root), "val", CONFIG)


def test_a_damaged_record_of_the_preparation_is_named(root: Path) -> None:
    prepare(str(root), lambda done, total: None)
    (root / "prepared_panoptic/panoptic_val2017/source.json").write_text('{"version": 2, "ann')
    with pytest.raises(UserError, match="source.json is damaged .*; delete .*panoptic_val2017 and run"):
        open_source(str(root), "val", CONFIG)


def test_missing_parts_of_the_data_set_are_named(root: Path, tmp_path: Path) -> None:
    shutil.rmtree(root / "annotations/panoptic_train2017")
    with pytest.raises(UserError, match="exists, but its PNGs do not"):
        open_source(str(root), "train", CONFIG)
    (root / "annotations/panoptic_train2017.zip").write_bytes(b"half a zip")
    with pytest.raises(UserError, match="truncated or not a zip file"):
        open_source(str(root), "train", CONFIG)
    shutil.rmtree(root / "val2017")
    with pytest.raises(UserError, match="holds no images: looked for val2017/ .* found annotations/ and train2017/; "):
        open_source(str(root), "val", CONFIG)
    (root / "annotations/panoptic_val2017.json").write_text('{"images": [')
    with pytest.raises(UserError, match="not valid JSON"):
        open_source(str(root), "val", CONFIG)
    with pytest.raises(UserError, match="holds no annotations/panoptic_val"):
        open_source(str(tmp_path), "val", CONFIG)
    (root / "annotations/panoptic_train2017.json").rename(root / "annotations/panoptic_training.json")
    (root / "annotations/panoptic_val2017.json").rename(root / "annotations/validation.json")
    with pytest.raises(UserError, match="panoptic_val.*json, only panoptic_training.json and validation.json; the"):
        open_source(str(root), "val", CONFIG)
    with pytest.raises(UserError, match="unknown split"):
        open_source(str(root), "test", CONFIG)


def test_data_check_reports_contradictions(root: Path) -> None:
    lines, ok = check_data("coco_panoptic", str(root))
    assert ok and "12 images" in lines[0] and "classes 7" in lines[0]

    def change(tree: dict[str, Any]) -> None:
        first_segments(tree)[0]["area"] = 1
        tree["annotations"][1]["segments_info"].append({"id": 99, "category_id": 1, "iscrowd": 0})
        tree["annotations"].pop()

    edit(root, change)
    lines, ok = check_data("coco_panoptic", str(root))
    assert not ok and any("areas of the JSON contradict the PNG, e.g. 1 for" in line for line in lines)
    assert any("1 segments of the JSON have no pixel" in line for line in lines)
    assert any("images without annotation 1" in line for line in lines)


def test_an_image_without_segments_is_all_void(root: Path) -> None:
    edit(root, lambda tree: tree["annotations"][0].update(segments_info=[]))
    Image.fromarray(np.zeros((24, 32, 3), np.uint8)).save(first_png(root))
    task = task_for(root)
    sample = task.source(str(root), "val")[0]
    assert all(not labels.any() for labels in task.encode(sample).values())
    assert "no segments" in str(task.check_sample(sample))
    row = task.metric(task.source(str(root), "val")).update(sample.meta["segments"], sample)
    assert row["pq"] == 0 and row["segments_gt"] == 0
