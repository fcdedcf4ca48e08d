"""The synthetic rooms are exact, reproducible, and stored in the real data sets' formats."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import scipy.io
from PIL import Image

from uvim_fsq.synthetic.render import CATEGORIES, Scene, render
from uvim_fsq.synthetic.writers import VAL_START, write_dataset

SIZE, SEED = 32, 5
DIFFICULTIES = ("plain", "varied")


def points_of(scene: Scene) -> np.ndarray:
    """(H, W, 3) world coordinates of the pixel centres, from depth and camera alone."""
    height, width = scene.depth.shape
    rows, columns = np.mgrid[:height, :width] + 0.5
    focal = scene.camera.focal * height
    rays = np.stack([(columns - width / 2) / focal, (height / 2 - rows) / focal, np.ones_like(rows)], axis=-1)
    return (rays * scene.depth[..., None]) @ scene.camera.basis + scene.camera.origin


def mask_of(scene: Scene, name: str) -> np.ndarray:
    ids = [info["id"] for info in scene.segments_info if info["name"] == name]
    return np.isin(scene.segments, ids)


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_same_seed_and_index_give_the_same_scene(difficulty):
    first, again, other = (render(SEED, i, SIZE, difficulty) for i in (3, 3, 4))
    for name in ("image", "depth", "segments"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
    assert first.segments_info == again.segments_info
    assert np.abs(first.depth - other.depth).mean() > 0.05
    assert np.abs(first.depth - render(SEED + 1, 3, SIZE, difficulty).depth).mean() > 0.05


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
@pytest.mark.parametrize("size", [32, 96, (48, 64)])
def test_fields_have_the_promised_types_and_ranges(difficulty, size):
    shape = (size, size) if isinstance(size, int) else size
    categories = {c["id"]: c["name"] for c in CATEGORIES}
    for index in range(40):
        scene = render(SEED, index, size, difficulty)
        assert scene.image.shape == (*shape, 3) and scene.image.dtype == np.uint8
        assert scene.depth.shape == shape and scene.depth.dtype == np.float32
        assert scene.segments.shape == shape and scene.segments.dtype == np.int32
        assert scene.depth.min() > 0.3 and scene.depth.max() < 9.9
        ids = [info["id"] for info in scene.segments_info]
        assert ids == list(range(1, len(ids) + 1)) == np.unique(scene.segments).tolist()
        assert all(categories[info["category_id"]] == info["name"] for info in scene.segments_info)
        assert scene.image.std() > 8


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_floor_wall_and_ceiling_points_lie_on_their_planes(difficulty):
    for index in range(20):
        scene = render(SEED, index, SIZE, difficulty)
        points = points_of(scene)
        floor, ceiling, wall = (points[mask_of(scene, name)] for name in ("floor", "ceiling", "wall"))
        assert np.abs(floor[:, 2]).max() < 1e-4
        assert len(ceiling) == 0 or np.ptp(ceiling[:, 2]) < 1e-4
        sides = [points[..., axis][mask_of(scene, "wall")] for axis in (0, 1)]
        bounds = [(points[..., axis].min(), points[..., axis].max()) for axis in (0, 1)]
        on_side = [np.isclose(s[:, None], b, atol=1e-3).any(1) for s, b in zip(sides, bounds, strict=True)]
        assert (on_side[0] | on_side[1]).all() and wall[:, 2].min() > -1e-4


def test_things_stand_above_the_floor_and_inside_the_room():
    for index in range(20):
        scene = render(SEED, index, 64)
        points, things = points_of(scene), ~np.isin(scene.segments, [0])
        for name in ("floor", "wall", "ceiling"):
            things &= ~mask_of(scene, name)
        assert points[things][:, 2].min() > -1e-3
        wall = points[mask_of(scene, "wall")]
        assert points[things][:, 1].max() < wall[:, 1].max() + 1e-3


def test_sphere_points_are_equally_far_from_a_centre():
    tested = 0
    for index in range(12):
        scene = render(SEED, index, 128)
        points = points_of(scene)
        for info in scene.segments_info:
            surface = points[scene.segments == info["id"]]
            if info["name"] != "sphere" or len(surface) < 100:
                continue
            # |p|^2 = 2 p.c + (r^2 - |c|^2) is linear in the unknowns
            design = np.concatenate([2 * surface, np.ones((len(surface), 1))], axis=1)
            solution = np.linalg.lstsq(design, (surface**2).sum(axis=1), rcond=None)[0]
            radius = np.linalg.norm(surface - solution[:3], axis=1)
            assert np.ptp(radius) < 2e-3 and 0.02 < radius.mean() < 0.7
            tested += 1
    assert tested >= 3


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_the_scene_does_not_depend_on_the_picture_size(difficulty):
    for index in range(8):
        small, large = render(SEED, index, 32, difficulty), render(SEED, index, 96, difficulty)
        # pixel centres of the small picture are pixel centres of the three times larger one
        np.testing.assert_allclose(small.depth, large.depth[1::3, 1::3], atol=2e-3)
        names = [np.array([""] + [i["name"] for i in s.segments_info])[s.segments] for s in (small, large)]
        assert (names[0] == names[1][1::3, 1::3]).mean() > 0.995
        coarse = large.image.reshape(32, 3, 32, 3, 3).mean(axis=(1, 3))
        assert np.abs(coarse - small.image).mean() < 12


def test_plain_rooms_share_camera_height_and_focal_length():
    cameras = [render(SEED, i, 16, "plain").camera for i in range(10)]
    assert {(c.origin[2], c.focal) for c in cameras} == {(1.5, 0.95)}
    varied = [render(SEED, i, 16).camera for i in range(10)]
    assert len({c.origin[2] for c in varied}) == len({c.focal for c in varied}) == 10


@pytest.mark.parametrize(("size", "difficulty"), [(4, "plain"), ((32, 64), "plain"), (32, "hard")])
def test_impossible_requests_are_refused(size, difficulty):
    with pytest.raises(ValueError, match="size|difficulty"):
        render(SEED, 0, size, difficulty)


# ---------------------------------------------------------------- files


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
        assert file["images"].shape == (7, 3, 32, 24) and file["images"].chunks is None  # a row is one piece
        for split, indices in (("train", train), ("val", test)):
            for number, place in enumerate(indices[:, 0].astype(int) - 1):
                scene, raw = scene_of(number, split, (24, 32)), file["rawDepths"][place].T
                np.testing.assert_array_equal(file["images"][place].transpose(2, 1, 0), scene.image)
                np.testing.assert_array_equal(file["depths"][place].T, scene.depth)
                np.testing.assert_array_equal(raw[raw > 0], scene.depth[raw > 0])
                assert 0 < (raw == 0).mean() < 0.5


def test_nyu_png_lists_name_every_picture_and_depth_is_in_millimetres(tmp_path):
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
    ],
)
def test_wrong_requests_are_refused_before_anything_is_written(tmp_path, format, options, message):
    with pytest.raises(ValueError, match=message):
        write(tmp_path, format, **options)
    assert list(tmp_path.iterdir()) == []
