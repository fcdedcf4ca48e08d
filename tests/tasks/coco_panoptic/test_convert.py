"""`uvim-fsq data convert`: original labels of Cityscapes and ADE20K to the panoptic format."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.support.cli import failure
from tests.support.panoptic import read_segments
from tests.support.panoptic_layouts import write_ade20k, write_cityscapes
from uvim_fsq.cli import main
from uvim_fsq.errors import UserError
from uvim_fsq.tasks.coco_panoptic.convert import ADE20K_STUFF, CITYSCAPES, convert
from uvim_fsq.tasks.coco_panoptic.segments import rgb_to_ids


def quiet(root: Path, out: Path | None = None) -> str:
    return convert(str(root), out, lambda done, total: None)


def read(file: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A panoptic JSON, and its id maps by image id."""
    tree = json.loads(file.read_text())
    maps = {a["image_id"]: np.asarray(Image.open(file.with_suffix("") / a["file_name"])) for a in tree["annotations"]}
    return tree, {name: rgb_to_ids(pixels) for name, pixels in maps.items()}


def test_cityscapes_keeps_evaluated_classes_and_marks_groups(tmp_path: Path) -> None:
    written = write_cityscapes(tmp_path)
    assert "2 train images, 1 val images" in quiet(tmp_path)
    things = {number for number, _, _, thing, _ in CITYSCAPES if thing}
    evaluated = {number for number, *_ in CITYSCAPES}
    for split in ("train", "val"):
        tree, maps = read(tmp_path / f"gtFine/cityscapes_panoptic_{split}.json")
        for entry in tree["annotations"]:
            original, ids = written[entry["image_id"]], maps[entry["image_id"]]
            classes = np.where(original < 1000, original, original // 1000)
            np.testing.assert_array_equal(ids, np.where(np.isin(classes, list(evaluated)), original, 0))
            for info in entry["segments_info"]:
                mask = original == info["id"]
                assert info["category_id"] == classes[mask][0] and info["area"] == mask.sum()
                assert info["iscrowd"] == int(info["id"] < 1000 and info["category_id"] in things)
                x, y, w, h = info["bbox"]
                assert mask[y : y + h, x : x + w].sum() == mask.sum() and mask[:, x].any() and mask[y + h - 1].any()
            assert {info["id"] for info in entry["segments_info"]} == set(np.unique(ids)) - {0}
    assert not (tmp_path / "gtFine/cityscapes_panoptic_test.json").exists()


def test_cityscapes_files_equal_those_of_the_official_script(tmp_path: Path) -> None:
    script = pytest.importorskip("cityscapesscripts.preparation.createPanopticImgs", reason="needs cityscapesscripts")
    write_cityscapes(tmp_path / "ours")
    shutil.copytree(tmp_path / "ours", tmp_path / "theirs")
    quiet(tmp_path / "ours")
    with contextlib.redirect_stdout(io.StringIO()):
        script.convert2panoptic(str(tmp_path / "theirs/gtFine"))
    for split in ("train", "val"):
        ours, theirs = (
            read(tmp_path / name / f"gtFine/cityscapes_panoptic_{split}.json") for name in ("ours", "theirs")
        )
        assert ours[0] == theirs[0]
        for name, ids in theirs[1].items():
            np.testing.assert_array_equal(ours[1][name], ids)


def test_ade20k_pastes_instances_over_stuff(tmp_path: Path) -> None:
    written = write_ade20k(tmp_path)
    quiet(tmp_path)
    for split in ("train", "val"):
        tree, _ = read(tmp_path / f"ade20k_panoptic_{split}.json")
        assert [c["name"] for c in tree["categories"]][7] == "class 8, also 8" and len(tree["categories"]) == 150
        assert [c["id"] + 1 for c in tree["categories"] if not c["isthing"]] == list(ADE20K_STUFF)
        for entry in tree["annotations"]:
            semantic, number = written[entry["image_id"]]
            png = tmp_path / f"ade20k_panoptic_{split}" / entry["file_name"]
            found = read_segments(png, entry["segments_info"], list(range(150)))
            classes = np.concatenate([[0], found.classes])[found.ids]
            wanted = np.where(number > 0, np.array([0, 8, 13, 150])[number], semantic * np.isin(semantic, ADE20K_STUFF))
            np.testing.assert_array_equal(classes, wanted)
            for k in np.unique(number)[1:]:
                assert len(np.unique(found.ids[number == k])) == 1


def test_what_exists_is_left_alone_and_the_rest_is_converted(tmp_path: Path) -> None:
    write_cityscapes(tmp_path)
    train = tmp_path / "gtFine/cityscapes_panoptic_train.json"
    train.write_text("somebody's own")
    assert "train was there already, 1 val images" in quiet(tmp_path)
    assert train.read_text() == "somebody's own"
    train.unlink()
    (tmp_path / "gtFine/cityscapes_panoptic_train").mkdir()
    with pytest.raises(
        UserError, match="cityscapes_panoptic_train exists, but cityscapes_panoptic_train.json does not"
    ):
        quiet(tmp_path)


def test_an_interrupted_conversion_is_repeated(tmp_path: Path) -> None:
    write_cityscapes(tmp_path)

    def stop(done: int, total: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(str(tmp_path), None, stop)
    assert not list((tmp_path / "gtFine").glob("*.json"))
    assert "2 train images" in quiet(tmp_path) and not list(tmp_path.rglob("*.partial"))
    assert len(read(tmp_path / "gtFine/cityscapes_panoptic_train.json")[1]) == 2


@pytest.mark.parametrize(
    ("place", "pixels", "message"),
    [
        ("annotations/training", np.zeros((24, 32), np.uint16), "not a PNG of 1 x 8 bits"),
        ("annotations/training", np.zeros((20, 32), np.uint8), "have different sizes"),
        ("annotations/training", np.full((24, 32), 151, np.uint8), "class out of range"),
        ("annotations/training", None, "cannot be read .No such file"),
        ("annotations_instance/training", np.zeros((24, 32), np.uint8), "not a PNG of 3 x 8 bits"),
        ("annotations_instance/training", np.full((24, 32, 3), 101, np.uint8), "class out of range"),
    ],
)
def test_damaged_ade20k_files_are_named(tmp_path: Path, place: str, pixels: np.ndarray | None, message: str) -> None:
    write_ade20k(tmp_path)
    file = tmp_path / place / "ADE_train_00000001.png"
    file.unlink()
    if pixels is not None:
        Image.fromarray(pixels).save(file)
    with pytest.raises(UserError, match=message) as caught:
        quiet(tmp_path)
    assert "ADE_train_00000001.png" in str(caught.value)


def test_damaged_class_lists_and_folders_without_labels_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no labels to convert: neither Cityscapes"):
        quiet(tmp_path)
    (tmp_path / "annotations_instance/training").mkdir(parents=True)
    with pytest.raises(UserError, match="holds no labels to convert"):
        quiet(tmp_path)
    write_ade20k(tmp_path)
    names = tmp_path / "objectInfo150.txt"
    names.write_text("Idx\tName\n1\twall\n")
    with pytest.raises(UserError, match="does not list the classes 1 to 150"):
        quiet(tmp_path)
    names.unlink()
    with pytest.raises(UserError, match="objectInfo150.txt cannot be read"):
        quiet(tmp_path)


def test_the_command_converts_and_names_the_next_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_cityscapes(tmp_path / "city")
    main(["data", "convert", str(tmp_path / "city"), "--task", "coco_panoptic", "--out", str(tmp_path / "labels")])
    said = capsys.readouterr()
    assert "Cityscapes: 2 train images, 1 val images; in " in said.out + said.err
    assert (tmp_path / "labels/gtFine/cityscapes_panoptic_val.json").is_file()
    assert len(list((tmp_path / "city/gtFine").glob("*.json"))) == 0
    with pytest.raises(SystemExit):
        main(["data", "convert", str(tmp_path / "city"), "--task", "coco_panoptic", "--report", "x.html"])
    assert "unrecognized arguments: --report" in capsys.readouterr().err, "an option of `data check`"
    assert "nothing to convert" in failure(capsys, "data", "convert", tmp_path / "city", "--task", "nyu_depth")
