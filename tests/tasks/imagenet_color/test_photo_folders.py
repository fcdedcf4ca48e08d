"""Photos in every tree of ImageNet and in any folder."""

from __future__ import annotations

import hashlib
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import uvim_fsq.tasks.imagenet_color.data as photos
from tests.support.photos import photo, train_tree
from uvim_fsq.data import splits
from uvim_fsq.errors import UserError
from uvim_fsq.tasks.imagenet_color.coltran import reference_names
from uvim_fsq.tasks.imagenet_color.data import Paths, PhotoSource, open_source

pytestmark = pytest.mark.usefixtures("own_cache")

RNG = np.random.default_rng(0)


def val_name(number: int) -> str:
    return f"ILSVRC2012_val_{number:08d}.JPEG"


def values(source: PhotoSource) -> list[int]:
    return [int(source[i].image[0, 0, 0]) for i in range(len(source))]


@pytest.mark.parametrize("kind", ["flat", "wnid", "numbers"])
def test_imagenet_validation_photos_flat_or_in_class_folders(tmp_path: Path, kind: str) -> None:
    train_tree(tmp_path / "train")
    folder = {"flat": "", "wnid": "n00000001", "numbers": "7"}[kind]
    for i in range(1, 5):
        photo(tmp_path / "val" / folder / val_name(i), 100 + i)
    train, val = (open_source(str(tmp_path), split) for split in ("train", "val"))
    assert train.info == {
        "layout": "imagenet",
        "split": "train",
        "count": 21,
        "official_count": 1_281_167,
        "root": tmp_path.name,
    }
    assert val.info["official_count"] == 50_000 and val.info["layout"] == "imagenet"
    assert values(val) == [101, 102, 103, 104] and values(train) == [10 * c + i for c in range(3) for i in range(7)]
    copy = pickle.loads(pickle.dumps(val))
    sample = copy[3]
    assert copy.names == val.names and copy.root == tmp_path and sample.id == val.names[3]
    assert sample.id == os.path.join("val", folder, val_name(4)) and sample.maps == {}
    assert sample.meta["name"] == val_name(4) and sample.image.shape == (4, 6, 3) and sample.image.dtype == np.uint8


@pytest.mark.parametrize("root", ["", "ILSVRC", "ILSVRC/Data/CLS-LOC"])
def test_the_kaggle_tree_is_recognized(tmp_path: Path, root: str) -> None:
    base = tmp_path / "ILSVRC" / "Data" / "CLS-LOC"
    train_tree(base / "train", 2, 3)
    photo(base / "val" / val_name(1), 50)
    photo(base / "test" / "ILSVRC2012_test_00000001.JPEG", 60)
    photo(tmp_path / "ILSVRC" / "picture.png", 70)
    train, val = (open_source(str(tmp_path / root), split) for split in ("train", "val"))
    assert (values(train), values(val)) == ([0, 1, 2, 10, 11, 12], [50])
    assert val.info["layout"] == "kaggle" and val.info["official_count"] == 50_000
    assert open_source(str(val.root), "val").names == val.names


def test_own_train_and_val_folders(tmp_path: Path) -> None:
    for i in range(3):
        photo(tmp_path / "train" / "deep" / "er" / f"{i}.png", i)
    photo(tmp_path / "val" / "x.jpeg", 9)
    train = open_source(str(tmp_path), "train")
    assert values(train) == [0, 1, 2]
    assert train.info["layout"] == "train-val" and train.info["official_count"] is None


def test_a_folder_of_photos_is_split_by_position(tmp_path: Path) -> None:
    for i in range(23):
        photo(tmp_path / "abc"[i % 3] / f"{i:02d}.{('PNG', 'JpEg', 'jpg')[i % 3]}", i)
    for name in (".hidden.jpg", "._00.jpg", "__MACOSX/00.jpg", ".git/01.jpg", "a/notes.txt", "a/list.csv"):
        photo(tmp_path / name, 200)
    in_order = [i for rest in range(3) for i in range(rest, 23, 3)]
    train, val = (open_source(str(tmp_path), split) for split in ("train", "val"))
    assert values(val) == in_order[::10] and len(val) == 3
    assert values(train) == [v for i, v in enumerate(in_order) if i % 10]
    assert train.info["layout"] == "folder" and train.info["official_count"] is None


def test_links_are_followed_once(tmp_path: Path) -> None:
    photo(tmp_path / "far" / "1.png", 1)
    (tmp_path / "set").mkdir()
    photo(tmp_path / "set" / "0.png", 0)
    (tmp_path / "set" / "link").symlink_to(tmp_path / "far")
    (tmp_path / "far" / "back").symlink_to(tmp_path / "set")
    assert values(open_source(str(tmp_path / "set"), "val")) + values(open_source(str(tmp_path / "set"), "train")) == [
        0,
        1,
    ]


def test_validation_photos_alone(tmp_path: Path) -> None:
    for i in range(1, 13):
        photo(tmp_path / val_name(i), i)
    assert values(open_source(str(tmp_path), "val")) == list(range(1, 13))
    with pytest.raises(UserError, match="only ImageNet's validation photos; split train needs train/"):
        open_source(str(tmp_path), "train")


def test_the_holdout_is_chosen_by_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_tree(tmp_path / "train", 5, 9)
    train, holdout, rest = (open_source(str(tmp_path), split) for split in ("train", "holdout", "train_minus_holdout"))
    by_hash = sorted(train.names, key=lambda name: hashlib.md5(os.path.basename(name).encode()).digest())
    assert holdout.names == sorted(by_hash[:4])
    assert sorted([*holdout.names, *rest.names]) == train.names and rest.names == sorted(rest.names)
    monkeypatch.setattr(splits, "HOLDOUT", 3)
    assert open_source(str(tmp_path), "holdout").names == sorted(by_hash[:3])


def test_coltran_splits_keep_the_order_of_their_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [val_name(i) for i in (5, 2, 9)]
    monkeypatch.setitem(photos.COLTRAN, "coltran_evaluation", lambda: wanted)
    for i in range(1, 12):
        photo(tmp_path / "val" / f"{i % 4}" / val_name(i), i)
    source = open_source(str(tmp_path), "coltran_evaluation")
    assert values(source) == [5, 2, 9] and source.info["official_count"] == 5000
    (tmp_path / "val" / "2" / val_name(2)).unlink()
    with pytest.raises(UserError, match=rf"1 of the 3 photos .* missing, the first is {val_name(2)}; unpack"):
        open_source(str(tmp_path), "coltran_evaluation")
    with pytest.raises(UserError, match=f"of the 5000 photos .* missing, the first is {reference_names()[0]}"):
        open_source(str(tmp_path), "coltran_reference")
    for path in list((tmp_path / "val").rglob("*.JPEG")):
        path.rename(tmp_path / path.name)
    for folder in sorted((tmp_path / "val").iterdir()):
        folder.rmdir()
    (tmp_path / "val").rmdir()
    photo(tmp_path / val_name(2), 2)
    assert values(open_source(str(tmp_path), "coltran_evaluation")) == [5, 2, 9]


def test_missing_photos_are_named_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown split 'validation'; known: train, val, holdout"):
        open_source(str(tmp_path), "validation")
    with pytest.raises(UserError, match="no such folder"):
        open_source(str(tmp_path / "nowhere"), "train")
    with pytest.raises(UserError, match="no photos found"):
        open_source(str(tmp_path), "train")
    archive = tmp_path / "ILSVRC2012_img_val.tar"
    archive.write_bytes(b"")
    with pytest.raises(UserError, match="it holds ILSVRC2012_img_val.tar, unpack it first"):
        open_source(str(tmp_path), "train")
    with pytest.raises(UserError, match="is a file; unpack it"):
        open_source(str(archive), "train")
    photo(tmp_path / "alone" / "x.png")
    with pytest.raises(UserError, match="too few photos, none left for split train"):
        open_source(str(tmp_path / "alone"), "train")
    photo(tmp_path / "half" / "val" / "x.png")
    for split in ("train", "holdout", "train_minus_holdout"):
        with pytest.raises(UserError, match="half: found val/, but no train/: add train/, or set data.root"):
            open_source(str(tmp_path / "half"), split)
    photo(tmp_path / "other" / "train" / "x.png")
    with pytest.raises(UserError, match="other: found train/, but no val/: add val/, or"):
        open_source(str(tmp_path / "other"), "val")


@pytest.mark.parametrize(
    ("names", "split", "message"),
    [
        (("training", "val"), "train", "found training/ and val/, but no train/: rename training/ to train/"),
        (("Train", "val"), "train", "no train/: rename Train/ to train/"),
        (("train", "validation"), "val", "no val/: rename validation/ to val/"),
        (("train", "test"), "val", "no val/: rename test/ to val/"),
        (("training", "validation"), "train", "no train/: rename training/"),
        (("training", "validation"), "val", "no val/: rename validation/"),
    ],
)
def test_a_misnamed_folder_is_named_with_the_expected_name(
    tmp_path: Path, names: tuple[str, str], split: str, message: str
) -> None:
    """Otherwise the photos of both folders would be used for training."""
    for name in names:
        for i in range(12):
            photo(tmp_path / name / f"{i}.png")
    with pytest.raises(UserError, match=message):
        open_source(str(tmp_path), split)


def test_unusual_photos_are_read_and_broken_ones_refused(tmp_path: Path) -> None:
    ramp = np.linspace(0, 255, 64 * 48).reshape(48, 64)
    gray = ramp.astype(np.uint8)
    Image.fromarray(np.stack([gray] * 3, -1)).convert("CMYK").save(tmp_path / "0_cmyk.JPEG", format="JPEG", quality=100)
    Image.fromarray(gray).save(tmp_path / "1_gray.jpg", quality=100)
    Image.fromarray((ramp * 257).astype(np.uint16)).save(tmp_path / "2_wide.png")
    Image.fromarray(np.stack([gray, gray // 2, 255 - gray], -1)).save(tmp_path / "3_png.JPEG", format="PNG")
    for name in ("4_cut.jpg", "5_text.jpg"):
        Image.fromarray(RNG.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(tmp_path / name)
    cut = tmp_path / "4_cut.jpg"
    cut.write_bytes(cut.read_bytes()[:900])
    (tmp_path / "5_text.jpg").write_text("404: not found")
    every = {
        name: open_source(str(tmp_path), split)
        for split in ("train", "val")
        for name in open_source(str(tmp_path), split).names
    }
    read = {name[0]: source[source.names.index(name)].image for name, source in every.items() if name[0] < "4"}
    assert all(image.shape == (48, 64, 3) and image.dtype == np.uint8 for image in read.values())
    for number, tolerance in (("0", 6), ("1", 2), ("2", 1)):
        assert np.abs(read[number].astype(int) - gray[..., None].astype(int)).max() <= tolerance
    np.testing.assert_array_equal(read["3"], np.stack([gray, gray // 2, 255 - gray], -1))
    for name in ("4_cut.jpg", "5_text.jpg"):
        with pytest.raises(UserError, match=f"{name} cannot be read as an image") as error:
            every[name][every[name].names.index(name)]
        assert "\n" not in str(error.value)


def test_packed_paths_hold_any_characters() -> None:
    paths = ["a/b.jpg", "ünï/cödé.png", "new\nline.jpg", os.fsdecode(b"latin\xff.jpg"), ""]
    packed = pickle.loads(pickle.dumps(Paths.of(paths)))
    assert list(packed) == [packed[i] for i in range(len(packed))] == paths
    assert list(Paths.of([])) == []
