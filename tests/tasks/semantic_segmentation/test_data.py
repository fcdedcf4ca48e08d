"""Folders of photos and class PNGs: layouts, encodings, splits, damage."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from uvim_fsq.commands.data_check import check_data
from uvim_fsq.data.decoded import keep_decoded
from uvim_fsq.errors import UserError
from uvim_fsq.tasks.semantic_segmentation.config import SemanticSegmentationConfig
from uvim_fsq.tasks.semantic_segmentation.data import ClassTable, open_source, read_label_map

CLASSES = ((0, "road", "#804080"), (3, "sky", "#4682b4"), (7, "other", "#000000"))
TRUTH = [[0, 3], [7, 255]]


def config(**options: Any) -> SemanticSegmentationConfig:
    return SemanticSegmentationConfig(**{"classes": CLASSES, **options})


def table(**options: Any) -> ClassTable:
    return ClassTable.of(config(**options))


def pair(photo: Path, labels: Path, values: Any = TRUTH) -> None:
    """Writes a photo and its class PNG."""
    for file in (photo, labels):
        file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.array(values, np.uint8)
    Image.fromarray(np.zeros((*pixels.shape[:2], 3), np.uint8)).save(photo)
    Image.fromarray(pixels).save(labels)


def decoded(tmp_path: Path, image: Image.Image, **options: Any) -> list[list[int]]:
    image.save(tmp_path / "x.png")
    return read_label_map(tmp_path / "x.png", table(**options), "x.png").tolist()


def test_gray_palette_and_wide_pngs_hold_pixel_values(tmp_path: Path) -> None:
    expected = [[0, 1], [2, -1]]
    values = np.array(TRUTH, np.uint8)
    palette = Image.fromarray(values, "P")
    palette.putpalette(bytes(range(256)) * 3)
    for image in (Image.fromarray(values), palette, Image.fromarray(values.astype(np.uint16))):
        assert decoded(tmp_path, image) == expected
    assert decoded(tmp_path, Image.fromarray(values), ignore=(255, 7)) == [[0, 1], [-1, -1]]
    assert decoded(tmp_path, Image.fromarray(values), ignore_names=("other",)) == [[0, 1], [-1, -1]]


def test_rgb_pngs_hold_the_colors_of_the_classes(tmp_path: Path) -> None:
    colors = np.array([[[128, 64, 128], [70, 130, 180]], [[0, 0, 0], [128, 64, 128]]], np.uint8)
    assert decoded(tmp_path, Image.fromarray(colors)) == [[0, 1], [2, 0]]
    assert decoded(tmp_path, Image.fromarray(colors), ignore_names=("other",)) == [[0, 1], [-1, 0]]
    with pytest.raises(UserError, match=r"x.png: 1 pixels are \(0, 0, 0\), which is no class"):
        decoded(tmp_path, Image.fromarray(colors), classes=CLASSES[:2])
    same = (CLASSES[0], (3, "sky", "#804080"))
    with pytest.raises(UserError, match="two classes have the same"):
        decoded(tmp_path, Image.fromarray(colors), classes=same)


def test_what_is_no_class_map_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="x.png: 1 pixels are 255, which is no class; add it to the class file"):
        decoded(tmp_path, Image.fromarray(np.array(TRUTH, np.uint8)), ignore=())
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "x.jpg")
    with pytest.raises(UserError, match="is a JPEG, which changes the values"):
        read_label_map(tmp_path / "x.jpg", table(), "x.jpg")
    with pytest.raises(UserError, match="each photo needs its class PNG"):
        read_label_map(tmp_path / "none.png", table(), "none.png")
    (tmp_path / "x.png").write_bytes((tmp_path / "x.png").read_bytes()[:40])
    with pytest.raises(UserError, match="cannot be read as a class PNG"):
        read_label_map(tmp_path / "x.png", table(), "x.png")


@pytest.mark.parametrize(
    ("photo", "labels", "options"),
    [
        ("{}/images/a/1.jpg", "{}/labels/a/1.png", {}),
        ("images/{}/1.jpg", "annotations/{}/1.png", {}),
        ("{}/1.jpg", "{}annot/1.png", {}),
        (
            "leftImg8bit/{}/ulm/1_leftImg8bit.png",
            "gtFine/{}/ulm/1_gtFine_labelTrainIds.png",
            {"image_suffix": "_leftImg8bit", "label_suffix": "_gtFine_labelTrainIds"},
        ),
        ("{}/1.jpg", "{}/1_mask.png", {"image_dir": "{split}", "label_dir": "{split}", "label_suffix": "_mask"}),
    ],
)
def test_layouts_are_found(tmp_path: Path, photo: str, labels: str, options: dict[str, str]) -> None:
    for part in ("train", "val"):
        pair(tmp_path / photo.format(part), tmp_path / labels.format(part))
    for part in ("train", "val"):
        source = open_source(str(tmp_path), part, config(**options))
        assert len(source) == 1 and source[0].id.endswith("1") and source.info["classes"] == 3
        assert source[0].maps["classes"].tolist() == [[0, 1], [2, -1]]


def test_ade20ks_names_of_the_parts_are_known(tmp_path: Path) -> None:
    for part in ("training", "validation"):
        pair(tmp_path / f"images/{part}/{part}.jpg", tmp_path / f"annotations/{part}/{part}.png")
    assert [open_source(str(tmp_path), part, config())[0].id for part in ("train", "val")] == ["training", "validation"]


def test_a_list_file_names_the_photos_of_a_split(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        pair(tmp_path / f"JPEGImages/{name}.jpg", tmp_path / f"SegmentationClass/{name}.png")
    Image.new("RGB", (2, 2)).save(tmp_path / "JPEGImages/unlisted.jpg")  # needs no class PNG
    lists = {"train": "c\nJPEGImages/a.jpg\n", "val": "b.jpg b.png\n"}
    for part, text in lists.items():
        (tmp_path / f"{part}.txt").write_text(text.replace("JPEGImages/", ""))
    options = {"image_dir": "JPEGImages", "label_dir": "SegmentationClass", "list_file": "{split}.txt"}
    sources = {part: open_source(str(tmp_path), part, config(**options)) for part in lists}
    assert {part: [name for name, *_ in source.pairs] for part, source in sources.items()} == {
        "train": ["c", "a"],
        "val": ["b"],
    }
    (tmp_path / "val.txt").write_text("../b\n")
    with pytest.raises(UserError, match="val.txt lists '../b', but there is no photo of that name"):
        open_source(str(tmp_path), "val", config(**options))


def test_without_parts_every_tenth_photo_is_val(tmp_path: Path) -> None:
    for i in range(11):
        pair(tmp_path / f"images/{i:02d}.jpg", tmp_path / f"masks/{i:02d}.png")
    sizes = {part: len(open_source(str(tmp_path), part, config())) for part in ("train", "val")}
    assert sizes == {"train": 9, "val": 2}


def test_splits_for_tuning_are_parts_of_train(scenes: Path) -> None:
    names = {
        split: [name for name, *_ in open_source(str(scenes), split, config()).pairs]
        for split in ("train", "holdout", "train_minus_holdout", "val")
    }
    assert [len(found) for found in names.values()] == [10, 1, 9, 3]
    assert sorted(names["holdout"] + names["train_minus_holdout"]) == names["train"]
    with pytest.raises(UserError, match="unknown split 'test'"):
        open_source(str(scenes), "test", config())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_dir": "{split}/images"}, "task.label_dir is missing"),
        ({"image_dir": "nope", "label_dir": "nope"}, "task.image_dir=nope: .* is not a folder"),
        ({"ignore_names": ("Void",)}, "task.ignore_names: no class is named Void"),
        ({"ignore": (0, 3)}, "1 classes are left"),
        ({"image_suffix": "_rgb"}, "images holds no photos whose name ends with _rgb"),
        ({"label_suffix": "_gt"}, "10 photos have no class PNG, the first would be 000000_gt.png"),
        ({"list_file": "train.txt"}, "task.list_file: .* cannot be read"),
    ],
)
def test_wrong_settings_are_named(scenes: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_source(str(scenes), "train", config(**options))


def test_data_check_finds_each_kind_of_damage(scenes: Path, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(scenes, root)
    assert check_data("semantic_segmentation", str(root))[1]
    labels = root / "val/labels"
    Image.fromarray(np.full((24, 32), 255, np.uint8)).save(labels / "000000.png")
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(labels / "000001.png")
    Image.fromarray(np.full((24, 32), 99, np.uint8)).save(labels / "000002.png")
    lines, ok = check_data("semantic_segmentation", str(root))
    text = "\n".join(lines)
    assert not ok and "000000: no pixel of this image has a label" in text
    assert "000001.png is (4, 4), but its photo (24, 32)" in text and "768 pixels are 99, which is no class" in text
    (labels / "000000.png").unlink()
    lines, ok = check_data("semantic_segmentation", str(root))
    assert not ok and any("1 photos have no class PNG, the first would be 000000.png" in line for line in lines)


@pytest.mark.parametrize(
    ("pixels", "classes"),
    [
        (TRUTH, ((3, "road", "#804080"), (0, "sky", "#4682b4"), CLASSES[2])),
        ([[[128, 64, 128], [70, 130, 180]]], ((0, "road", "#4682b4"), (3, "sky", "#804080"), CLASSES[2])),
    ],
    ids=["values", "colors"],
)
def test_another_class_table_is_not_taken_from_decoded_files(tmp_path: Path, pixels: Any, classes: Any) -> None:
    for split in ("train", "val"):
        pair(tmp_path / f"images/{split}/a.png", tmp_path / f"annotations/{split}/a.png", pixels)
    with keep_decoded(str(tmp_path / "kept")):
        one = open_source(str(tmp_path), "train", config())[0].maps["classes"]
        two = open_source(str(tmp_path), "train", config(classes=classes))[0].maps["classes"]
    np.testing.assert_array_equal(two, np.array([1, 0, 2, -1])[one])
