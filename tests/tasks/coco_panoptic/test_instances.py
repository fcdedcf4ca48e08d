"""COCO instance annotations: masks, overlaps, crowds, background, damaged files."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.support.panoptic import CONFIG, segments, task_for
from tests.support.panoptic_layouts import (
    CATEGORIES,
    HEIGHT,
    WIDTH,
    crowd_mask,
    instances_tree,
    photo,
    polygon,
    runs_of,
    write_instances,
)
from uvim_fsq.commands.data_check import check_data
from uvim_fsq.data import images
from uvim_fsq.errors import UserError
from uvim_fsq.synthetic.writers import write_dataset
from uvim_fsq.tasks.coco_panoptic import index as coco_index
from uvim_fsq.tasks.coco_panoptic.data import open_source, prepare
from uvim_fsq.tasks.coco_panoptic.instances import compressed_runs, encode_mask, read_instances
from uvim_fsq.tasks.coco_panoptic.segments import Segments

masks = pytest.importorskip("pycocotools.mask", reason="needs pycocotools: pip install 'uvim-fsq[coco]'")


def truths(root: Path) -> dict[str, Segments]:
    source = open_source(str(root), "val", CONFIG)
    return {source[i].id: source[i].meta["segments"] for i in range(len(source))}


def test_masks_equal_those_of_the_coco_api(tmp_path: Path) -> None:
    tree = instances_tree()
    blob = np.random.default_rng(0).random((HEIGHT, WIDTH)) < 0.5
    rle = masks.encode(np.asfortranarray(blob, np.uint8))
    compressed = {"size": rle["size"], "counts": rle["counts"].decode()}
    tree["annotations"].append({"id": 9, "image_id": 5, "category_id": 7, "segmentation": compressed, "iscrowd": 0})
    file = write_instances(tmp_path, tree)
    official = pytest.importorskip("pycocotools.coco").COCO(str(file))
    index = read_instances(file)
    for row, image_id in enumerate(index.image_ids.tolist()):
        annotations = official.loadAnns(official.getAnnIds(image_id))
        wanted = sorted((a["category_id"], official.annToMask(a).tobytes()) for a in annotations)
        part = range(int(index.first[row]), int(index.first[row + 1]))
        ids = [int(index.category_ids[index.classes[k] - 1]) for k in part]
        assert (
            sorted(zip(ids, (masks.decode(index.rle(row, k)).tobytes(order="C") for k in part), strict=True)) == wanted
        )


def test_the_smaller_instance_lies_on_top_and_crowds_below_all(tmp_path: Path) -> None:
    write_instances(tmp_path)
    truth = truths(tmp_path)["011.png"]
    names = [list(CATEGORIES.values())[c - 1] for c in truth.classes]
    at = {name: truth.ids == number for number, name in enumerate(names, start=1)}
    assert names == ["dog", "cat", "dog", "cup"] and truth.crowd.tolist() == [True, False, False, False]
    assert at["cup"][4:8, 4:8].all() and not at["cat"][4:8, 4:8].any() and at["cat"][2, 2]
    assert (truth.ids[2:12, 18:24] == 3).all(), "the dog is in front of the crowd, which the file lists later"
    crowd = crowd_mask()
    crowd[2:12, 18:24] = False
    np.testing.assert_array_equal(truth.ids == 1, crowd)


def test_instances_that_others_cover_are_not_in_the_truth(tmp_path: Path) -> None:
    write_instances(tmp_path)
    truth = truths(tmp_path)["005.png"]
    assert [list(CATEGORIES.values())[c - 1] for c in truth.classes] == ["cat", "cup"]
    assert set(np.unique(truth.ids)) == {0, 1, 2}


def test_images_without_instances_are_kept(tmp_path: Path) -> None:
    write_instances(tmp_path)
    task = task_for(tmp_path)
    source = task.source(str(tmp_path), "val")
    assert len(source) == 3 and source.info["images_without_annotation"] == 1
    sample = next(source[i] for i in range(3) if source[i].id == "008.png")
    assert all(not labels.any() for labels in task.encode(sample).values())
    assert check_data("coco_panoptic", str(tmp_path))[1]


def test_predictions_on_the_background_are_wrong_and_those_in_a_crowd_are_not_counted(tmp_path: Path) -> None:
    write_instances(tmp_path)
    task = task_for(tmp_path)
    source = task.source(str(tmp_path), "val")
    sample = next(source[i] for i in range(3) if source[i].id == "011.png")
    ids = sample.meta["segments"].ids
    perfect = np.where(ids == 1, 0, ids)
    rows = [(2, 1, False), (3, 3, False), (4, 2, False)]

    def score(predicted: np.ndarray, *more: tuple[int, int, bool]) -> float:
        metric = task.metric(source)
        assert metric.protocol == "coco_instances/pq"
        return metric.update(segments(predicted, *rows, *more), sample)["pq"]

    assert score(perfect) == 100
    crowd, background = perfect.copy(), perfect.copy()
    crowd[14:20, 24:30] = 5
    background[21:, 1:10] = 5
    assert score(crowd, (5, 3, False)) == 100, "a dog in the crowd of dogs"
    assert score(crowd, (5, 2, False)) < 100, "a cup in the crowd of dogs"
    assert score(background, (5, 3, False)) < 100


def first(tree: dict[str, Any]) -> dict[str, Any]:
    return tree["annotations"][0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: first(t).update(segmentation=[[1, 1, float("nan"), 3, 4, 4]]), "annotation 0 has a polygon of 6"),
        (lambda t: first(t).update(segmentation=[[1, 1, 1e9, 3, 4, 4]]), "not pairs .x, y. in or near its image"),
        (lambda t: first(t).update(segmentation=[[1, 1, 5, 1, 5, 5, 1]]), "polygon of 7 numbers"),
        (lambda t: first(t).update(segmentation=[1, 1, 5, 1, 5, 5]), "must be a list of polygons"),
        (lambda t: first(t).update(segmentation=[["a", 1, 5, 1, 5, 5]]), "missing or invalid field"),
        (lambda t: t["annotations"][3]["segmentation"].update(counts=[5, 5]), "RLE: .* add up to 768"),
        (lambda t: t["annotations"][3]["segmentation"].update(counts=[-5, 773]), "damaged RLE"),
        (lambda t: t["annotations"][3]["segmentation"].update(counts=[2.5, 765.5]), "damaged RLE"),
        (lambda t: t["annotations"][3]["segmentation"].update(counts=[1 << 62] * 4 + [768]), "damaged RLE"),
        (lambda t: t["annotations"][3]["segmentation"].update(counts=""), "damaged RLE"),
        (lambda t: t["annotations"][3]["segmentation"].update(counts="~~~~"), "damaged RLE"),
        (lambda t: t["annotations"][3]["segmentation"].update(counts="oooo"), "damaged RLE"),
        (lambda t: t["annotations"][3]["segmentation"].update(size=[WIDTH, HEIGHT]), r"mask of \[32, 24\] in an image"),
        (lambda t: [a.pop("segmentation") for a in t["annotations"]], "holds boxes only"),
        (lambda t: first(t).update(image_id=77), "annotation 0 refers to image 77, missing"),
        (lambda t: first(t).update(category_id=77), "category 77, which `categories` does not list"),
        (lambda t: first(t).update(iscrowd="no"), "`iscrowd` is 'no'"),
        (lambda t: first(t).update(area=float("inf")), "has the area inf"),
        (lambda t: t["images"][0].update(height="24"), "has height '24' and width 32"),
        (lambda t: t["images"][0].update(height=10**6, width=10**6), "million pixels, but data.max_pixels"),
        (lambda t: t["images"][0].pop("width"), "missing or invalid field .*'width'"),
        (lambda t: t["images"][0].update(file_name="../../x.png"), "lies outside of the data set"),
        (lambda t: t["images"][1].update(file_name="011.png"), "2 entries of `images` name the file 011.png"),
        (lambda t: t["images"][1].update(id=11), "repeat an image id"),
        (lambda t: t["categories"][1].update(id=3), "repeat an id"),
        (lambda t: t.update(images=[], annotations=[]), "holds no images"),
        (lambda t: t.pop("annotations"), "is not an instance annotation file: it needs the lists"),
    ],
)
def test_a_broken_file_is_one_line(tmp_path: Path, change: Any, message: str) -> None:
    tree = instances_tree()
    change(tree)
    file = tmp_path / "annotations/instances_val2017.json"
    file.parent.mkdir()
    file.write_text(json.dumps(tree))
    with pytest.raises(UserError, match=message) as caught:
        open_source(str(tmp_path), "val", CONFIG)
    assert "\n" not in str(caught.value) and "instances_val2017.json" in str(caught.value)


def test_annotations_without_a_mask_are_counted(tmp_path: Path) -> None:
    tree = instances_tree()
    tree["annotations"][0]["segmentation"] = []
    tree["annotations"][1]["segmentation"] = [[3, 3, 9, 9]]  # a line
    write_instances(tmp_path, tree)
    lines, ok = check_data("coco_panoptic", str(tmp_path))
    assert ok and "layout COCO instances, 3 images" in lines[0] and "annotations without mask 2" in lines[0]


def test_a_photo_of_another_size_is_named(tmp_path: Path) -> None:
    write_instances(tmp_path)
    photo(tmp_path / "val2017/005.png", 20, 32)
    with pytest.raises(UserError, match="005.png is 20 x 32 but its mask in instances_val2017.json is 24 x 32"):
        truths(tmp_path)


def test_panoptic_files_are_preferred_to_instances(tmp_path: Path) -> None:
    write_dataset("coco_panoptic", tmp_path, 2, (24, 32), num_val=2, workers=1)
    write_instances(tmp_path)
    assert task_for(tmp_path).config.annotations == "auto" and len(task_for(tmp_path).names) == 8
    task = task_for(tmp_path, annotations="instances")
    assert task.names == ["void", *CATEGORIES.values()] and task.is_thing[1:].all()
    assert task.source(str(tmp_path), "val").info["layout"] == "COCO instances"
    with pytest.raises(UserError, match="different categories"):
        open_source(str(tmp_path), "val", replace(task.config, annotations="panoptic"))


def test_instances_are_remembered_and_need_a_background_class(tmp_path: Path) -> None:
    write_instances(tmp_path)
    assert task_for(tmp_path).config.annotations == "instances"
    with pytest.raises(UserError, match="task.void=ignore would hide the background"):
        task_for(tmp_path, void="ignore")


def test_prepared_labels_equal_the_masks(tmp_path: Path) -> None:
    write_instances(tmp_path)
    before = truths(tmp_path)
    prepare(str(tmp_path), lambda done, total: None)
    assert open_source(str(tmp_path), "val", CONFIG).info["layout"] == "COCO instances (prepared labels)"
    for name, after in truths(tmp_path).items():
        np.testing.assert_array_equal(after.ids, before[name].ids)
        np.testing.assert_array_equal(after.classes, before[name].classes)
    tree = instances_tree()
    tree["annotations"][0]["segmentation"] = [polygon(4, 4, 8, 9)]
    write_instances(tmp_path, tree)
    with pytest.raises(UserError, match="was prepared from a different instances_val2017.json"):
        open_source(str(tmp_path), "val", CONFIG)


def test_a_cached_file_gives_the_same_masks(tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_instances(tmp_path)
    plain = read_instances(file)
    monkeypatch.setattr(coco_index, "CACHE_FROM", 0)
    for _ in range(2):
        file.touch()  # not from memory
        cached = read_instances(file)
        np.testing.assert_array_equal(cached.paint(1), plain.paint(1))
        assert cached.categories == plain.categories and cached.without_annotation == 1
    assert list(own_cache.glob("instances_index-*.npz"))


def test_folders_with_a_file_of_their_own_are_read(tmp_path: Path) -> None:
    """As annotation tools export them."""
    tree = instances_tree()
    for folder in ("train", "valid"):
        for image in tree["images"]:
            photo(tmp_path / folder / image["file_name"])
        (tmp_path / folder / "_annotations.coco.json").write_text(json.dumps(tree))
        tree["annotations"].pop()
    assert check_data("coco_panoptic", str(tmp_path))[1]
    prepare(str(tmp_path), lambda done, total: None)
    lines, ok = check_data("coco_panoptic", str(tmp_path))
    assert ok and sum("prepared" in line for line in lines) == 2


def test_run_lengths_are_read_from_compressed_text() -> None:
    rng = np.random.default_rng(0)
    for density in (0, 0.002, 0.1, 0.5, 1):
        mask = rng.random((90, 70)) < density
        text = masks.encode(np.asfortranarray(mask, np.uint8))["counts"]
        assert compressed_runs(text).tolist() == runs_of(mask)
        assert encode_mask({"size": [90, 70], "counts": text.decode()}, 90, 70, "x") == text
        assert encode_mask({"size": [90, 70], "counts": runs_of(mask)}, 90, 70, "x") == text
    assert runs_of(np.zeros((2, 2), bool)) == [4] and compressed_runs(b"o").tolist() == [-1]


def test_the_limit_of_pixels_holds_while_the_classes_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "_max_pixels", 100)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    write_instances(tmp_path)
    assert check_data("coco_panoptic", str(tmp_path), [f"data.max_pixels={HEIGHT * WIDTH}"])[1]


def test_names_of_classes_are_short_printable_text(tmp_path: Path) -> None:
    tree = instances_tree()
    for category, name in zip(tree["categories"], ("a\nb ", "\ud800", 100 * "c"), strict=True):
        category["name"] = name
    write_instances(tmp_path, tree)
    assert task_for(tmp_path).names == ["void", "a b", "?", 80 * "c"]


def test_without_pycocotools_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_instances(tmp_path)
    monkeypatch.setitem(sys.modules, "pycocotools.mask", None)
    with pytest.raises(UserError, match=r"pip install 'uvim-fsq\[coco\]'"):
        open_source(str(tmp_path), "val", CONFIG)
