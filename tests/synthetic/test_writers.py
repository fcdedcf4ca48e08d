"""Synthetic scenes are stored in the formats of the real data sets."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import h5py
import numpy as np
import pytest
import scipy.io
from PIL import Image

from uvim_fsq.synthetic.render import CATEGORIES, Scene, render
from uvim_fsq.synthetic.writers import VAL_START, write_dataset

SIZE, SEED = 32, 5


def write(tmp_path: Path, format: str, num: int = 5, num_val: int = 2, size=SIZE, **options) -> Path:
    out = tmp_path / "set"
    write_dataset(format, out, num, size, SEED, num_val, difficulty="plain", **({"workers": 1} | options))
    return out


def scene_of(number: int, split: str, size=SIZE) -> Scene:
    return render(SEED, number + (VAL_START if split == "val" else 0), size, "plain")


def assert_close_picture(path: Path, scene: Scene) -> None:
    stored = np.asarray(Image.open(path)).astype(int)
    assert stored.shape == scene.image.shape and np.abs(stored - scene.image).mean() < 4


def test_nyu_h5_files_hold_the_scenes(tmp_path):
    out = write(tmp_path, "nyu", num=102, size=(24, 32))
    assert len(list(out.glob("nyudepthv2/train/room_0001/*.h5"))) == 100
    for name, number, split in (
        ("train/room_0001/00001", 0, "train"),
        ("train/room_0002/00002", 101, "train"),
        ("val/official/00002", 1, "val"),
    ):
        scene = scene_of(number, split, (24, 32))
        with h5py.File(out / f"nyudepthv2/{name}.h5") as file:
            np.testing.assert_array_equal(file["rgb"][:], scene.image.transpose(2, 0, 1))
            np.testing.assert_array_equal(file["depth"][:], scene.depth)
            assert file["rgb"].dtype == np.uint8 and file["depth"].dtype == np.float32


def test_nyu_mat_holds_the_scenes_transposed_with_one_based_splits(tmp_path):
    out = write(tmp_path, "nyu", size=(24, 32), layout="mat")
    splits = scipy.io.loadmat(out / "splits.mat")
    train, test = splits["trainNdxs"], splits["testNdxs"]
    assert train.shape == (5, 1) and test.shape == (2, 1) and train.dtype == np.uint16
    assert sorted([*train[:, 0], *test[:, 0]]) == list(range(1, 8)) and test.max() > train.min() < test.min()
    with h5py.File(out / "nyu_depth_v2_labeled.mat") as file:
        assert file["images"].shape == (7, 3, 32, 24) and file["images"].chunks is None  # contiguous
        for split, indices in (("train", train), ("val", test)):
            for number, place in enumerate(indices[:, 0].astype(int) - 1):
                scene, raw = scene_of(number, split, (24, 32)), file["rawDepths"][place].T
                np.testing.assert_array_equal(file["images"][place].transpose(2, 1, 0), scene.image)
                np.testing.assert_array_equal(file["depths"][place].T, scene.depth)
                np.testing.assert_array_equal(raw[raw > 0], scene.depth[raw > 0])
                assert 0 < (raw == 0).mean() < 0.5


def test_nyu_png_lists_name_every_picture_and_depth_is_in_millimeters(tmp_path):
    out = write(tmp_path, "nyu", layout="png")
    train = (out / "nyudepthv2_train_files_with_gt.txt").read_text().splitlines()
    test = (out / "nyudepthv2_test_files_with_gt.txt").read_text().splitlines()
    assert train[1] == "/room_0001a/rgb_00001.jpg /room_0001a/sync_depth_00001.png 518.8579"
    assert test[1] == "room/rgb_00001.jpg room/sync_depth_00001.png 518.8579"
    assert (len(train), len(test)) == (5, 2)
    for top, lines, split in ((out / "sync", train, "train"), (out / "official_splits/test", test, "val")):
        for number, line in enumerate(lines):
            picture, depth = (top / part.lstrip("/") for part in line.split()[:2])
            scene = scene_of(number, split)
            assert_close_picture(picture, scene)
            stored = Image.open(depth)
            assert stored.mode.startswith("I;16")
            np.testing.assert_array_equal(np.asarray(stored), np.floor(scene.depth * 1000))


def test_coco_panoptic_annotations_describe_the_pngs(tmp_path):
    out = write(tmp_path, "coco_panoptic")
    for split, count in (("train", 5), ("val", 2)):
        document = json.loads((out / f"annotations/panoptic_{split}2017.json").read_text())
        assert len(document["images"]) == len(document["annotations"]) == count
        assert document["categories"] == CATEGORIES
        for number, (image, entry) in enumerate(zip(document["images"], document["annotations"], strict=True)):
            scene = scene_of(number, split)
            assert image["id"] == entry["image_id"] and image["file_name"] == f"{image['id']:012d}.jpg"
            assert_close_picture(out / f"{split}2017" / image["file_name"], scene)
            coded = np.asarray(Image.open(out / f"annotations/panoptic_{split}2017" / entry["file_name"])).astype(int)
            ids = coded @ [1, 256, 65536]
            assert sorted(s["id"] for s in entry["segments_info"]) == np.unique(ids).tolist()
            for segment, info in zip(entry["segments_info"], scene.segments_info, strict=True):
                mask = ids == segment["id"]
                np.testing.assert_array_equal(mask, scene.segments == info["id"])
                assert segment["category_id"] == info["category_id"] and segment["iscrowd"] == 0
                x, y, width, height = segment["bbox"]
                assert segment["area"] == mask.sum() == mask[y : y + height, x : x + width].sum()
                assert mask[:, x].any() and mask[:, x + width - 1].any()
                assert mask[y].any() and mask[y + height - 1].any()


def test_class_pngs_are_numbered_by_the_class_file(tmp_path):
    out = write(tmp_path, "semantic")
    names = [line.rsplit(" ", 3)[0] for line in (out / "classes.txt").read_text().splitlines()]
    assert names == [category["name"] for category in CATEGORIES]
    for split, number, count in (("train", 4, 5), ("val", 1, 2)):
        assert len(list((out / split / "labels").iterdir())) == count
        scene, stem = scene_of(number, split), f"{number:06d}"
        assert_close_picture(out / split / f"images/{stem}.jpg", scene)
        with Image.open(out / split / f"labels/{stem}.png") as png:
            classes = np.asarray(png)
        for info in scene.segments_info:
            assert {names[c] for c in classes[scene.segments == info["id"]]} == {info["name"]}


def test_normal_pngs_hold_the_normals_in_16_bits(tmp_path):
    out = write(tmp_path, "normals", size=(24, 32))
    for split, number, count in (("train", 4, 5), ("val", 1, 2)):
        assert len(list((out / split / "normals").iterdir())) == count
        scene, stem = scene_of(number, split, (24, 32)), f"{number:06d}"
        assert_close_picture(out / split / f"images/{stem}.jpg", scene)
        stored = cv2.imread(str(out / split / f"normals/{stem}.png"), cv2.IMREAD_UNCHANGED)
        assert stored is not None and stored.dtype == np.uint16
        np.testing.assert_allclose(stored[..., ::-1] / 32767.5 - 1, scene.normals, atol=2e-5)


def test_imagenet_train_is_foldered_and_val_is_flat(tmp_path):
    out = write(tmp_path, "imagenet")
    train = sorted(out.glob("train/*/*.JPEG"), key=lambda p: int(p.stem.split("_")[1]))
    assert len(train) == 5 and all(path.stem.split("_")[0] == path.parent.name for path in train)
    assert sorted(p.name for p in (out / "val").iterdir()) == [
        "ILSVRC2012_val_00000001.JPEG",
        "ILSVRC2012_val_00000002.JPEG",
    ]
    assert_close_picture(train[3], scene_of(3, "train"))
    assert_close_picture(out / "val/ILSVRC2012_val_00000002.JPEG", scene_of(1, "val"))


def test_scenes_are_of_the_given_world(tmp_path):
    out = write(tmp_path, "imagenet", world="still_life")
    assert_close_picture(
        out / "val/ILSVRC2012_val_00000002.JPEG", render(SEED, VAL_START + 1, SIZE, "plain", "still_life")
    )


def test_val_rooms_are_not_training_rooms():
    train, val = scene_of(0, "train"), scene_of(0, "val")
    assert np.abs(train.depth - val.depth).mean() > 0.05


def test_workers_write_the_same_files_and_report_progress(tmp_path):
    seen: list[tuple[int, int]] = []
    for name, workers in (("one", 1), ("two", 2)):
        (tmp_path / name).mkdir()
        write(tmp_path / name, "imagenet", workers=workers, progress=lambda *step: seen.append(step))
    assert seen == [(i, 7) for i in range(1, 8)] * 2
    for path in (tmp_path / "one/set").rglob("*.JPEG"):
        assert path.read_bytes() == (tmp_path / "two/set" / path.relative_to(tmp_path / "one/set")).read_bytes()


def test_an_existing_folder_is_refused_and_kept(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set/mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="delete it or choose another"):
        write(tmp_path, "nyu")
    assert [p.name for p in (tmp_path / "set").iterdir()] == ["mine.txt"]


def test_a_failed_write_leaves_nothing_behind(tmp_path):
    def stop(done: int, total: int) -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write(tmp_path, "nyu", progress=stop)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("format", "options", "message"),
    [
        ("kitti", {}, "unknown"),
        ("nyu", {"layout": "zip"}, "layout"),
        ("nyu", {"num": 0}, "num"),
        ("nyu", {"size": 4}, "size"),
        ("nyu", {"workers": 0}, "worker"),
        ("imagenet", {"world": "garden"}, "world"),
    ],
)
def test_wrong_requests_are_refused_before_anything_is_written(tmp_path, format, options, message):
    with pytest.raises(ValueError, match=message):
        write(tmp_path, format, **options)
    assert list(tmp_path.iterdir()) == []
