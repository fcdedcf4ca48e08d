"""Photos as they lie on disk, in every tree of ImageNet and any folder, and the cache of long lists."""

from __future__ import annotations

import hashlib
import os
import pickle
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import uvim_fsq.tasks.imagenet_color.data as photos
from uvim_fsq.data import splits
from uvim_fsq.data.cache import cache_dir, cached_arrays
from uvim_fsq.errors import UserError
from uvim_fsq.tasks.imagenet_color.coltran import reference_names
from uvim_fsq.tasks.imagenet_color.data import Paths, PhotoSource, open_source

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache") / "new"
    monkeypatch.setenv("UVIM_FSQ_CACHE", str(folder))
    return folder


# The adapter


def photo(path: Path, value: int = 0, size: tuple[int, int] = (6, 4)) -> None:
    """A PNG of one grey level under whatever name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size[1], size[0], 3), value, np.uint8)).save(path, format="PNG")


def val_name(number: int) -> str:
    return f"ILSVRC2012_val_{number:08d}.JPEG"


def train_tree(folder: Path, classes: int = 3, each: int = 7) -> None:
    for c in range(classes):
        for i in range(each):
            photo(folder / f"n{c:08d}" / f"n{c:08d}_{i}.JPEG", 10 * c + i)


def values(source: PhotoSource) -> list[int]:
    return [int(source[i].image[0, 0, 0]) for i in range(len(source))]


@pytest.mark.parametrize("kind", ["flat", "wnid", "numbers"])
def test_imagenet_trees(tmp_path: Path, kind: str) -> None:
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
def test_kaggle_tree(tmp_path: Path, root: str) -> None:
    base = tmp_path / "ILSVRC" / "Data" / "CLS-LOC"
    train_tree(base / "train", 2, 3)
    photo(base / "val" / val_name(1), 50)
    photo(base / "test" / "ILSVRC2012_test_00000001.JPEG", 60)
    photo(tmp_path / "ILSVRC" / "picture.png", 70)
    train, val = (open_source(str(tmp_path / root), split) for split in ("train", "val"))
    assert (values(train), values(val)) == ([0, 1, 2, 10, 11, 12], [50])
    assert val.info["layout"] == "kaggle" and val.info["official_count"] == 50_000
    assert open_source(str(val.root), "val").names == val.names


def test_own_train_and_val(tmp_path: Path) -> None:
    for i in range(3):
        photo(tmp_path / "train" / "deep" / "er" / f"{i}.png", i)
    photo(tmp_path / "val" / "x.jpeg", 9)
    train = open_source(str(tmp_path), "train")
    assert values(train) == [0, 1, 2]
    assert train.info["layout"] == "train-val" and train.info["official_count"] is None


def test_any_folder(tmp_path: Path) -> None:
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


def test_hold_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_tree(tmp_path / "train", 5, 9)
    train, holdout, rest = (open_source(str(tmp_path), split) for split in ("train", "holdout", "train_minus_holdout"))
    by_hash = sorted(train.names, key=lambda name: hashlib.md5(os.path.basename(name).encode()).digest())
    assert holdout.names == sorted(by_hash[:4])
    assert sorted([*holdout.names, *rest.names]) == train.names and rest.names == sorted(rest.names)
    monkeypatch.setattr(splits, "HOLDOUT", 3)
    assert open_source(str(tmp_path), "holdout").names == sorted(by_hash[:3])


def test_coltran_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_clear_errors(tmp_path: Path) -> None:
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
def test_misnamed_folders(tmp_path: Path, names: tuple[str, str], split: str, message: str) -> None:
    """All photos of both would have been one folder to train on."""
    for name in names:
        for i in range(12):
            photo(tmp_path / name / f"{i}.png")
    with pytest.raises(UserError, match=message):
        open_source(str(tmp_path), split)


def test_odd_files(tmp_path: Path) -> None:
    ramp = np.linspace(0, 255, 64 * 48).reshape(48, 64)
    grey = ramp.astype(np.uint8)
    Image.fromarray(np.stack([grey] * 3, -1)).convert("CMYK").save(tmp_path / "0_cmyk.JPEG", format="JPEG", quality=100)
    Image.fromarray(grey).save(tmp_path / "1_grey.jpg", quality=100)
    Image.fromarray((ramp * 257).astype(np.uint16)).save(tmp_path / "2_wide.png")
    Image.fromarray(np.stack([grey, grey // 2, 255 - grey], -1)).save(tmp_path / "3_png.JPEG", format="PNG")
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
        assert np.abs(read[number].astype(int) - grey[..., None].astype(int)).max() <= tolerance
    np.testing.assert_array_equal(read["3"], np.stack([grey, grey // 2, 255 - grey], -1))
    for name in ("4_cut.jpg", "5_text.jpg"):
        with pytest.raises(UserError, match=f"{name} cannot be read as an image") as error:
            every[name][every[name].names.index(name)]
        assert "\n" not in str(error.value)


def test_paths_of_any_letters() -> None:
    paths = ["a/b.jpg", "ünï/cödé.png", "new\nline.jpg", os.fsdecode(b"latin\xff.jpg"), ""]
    packed = pickle.loads(pickle.dumps(Paths.of(paths)))
    assert list(packed) == [packed[i] for i in range(len(packed))] == paths
    assert list(Paths.of([])) == []


# The cache


def settle(root: Path) -> None:
    """Makes folders look as if nothing had changed in them for a minute."""
    for folder in [root, *root.rglob("*")]:
        if folder.is_dir():
            os.utime(folder, ns=(then := time.time_ns() - 60_000_000_000, then))


def test_long_lists_come_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    train_tree(tmp_path / "train", 2, 6)
    assert len(open_source(str(tmp_path), "train")) == 12 and not own_cache.exists()  # too short to be kept
    monkeypatch.setattr(photos, "CACHE_ABOVE", 5)
    scans: list[Path] = []
    scan = photos._scan
    monkeypatch.setattr(photos, "_scan", lambda root: scans.append(root) or scan(root))

    def listed() -> list[str]:
        return [os.path.basename(name) for name in open_source(str(tmp_path), "train").names]

    names = listed()
    assert listed() == names and len(scans) == 2  # written just now, so not relied on
    settle(tmp_path)
    assert [listed() for _ in range(3)] == [names] * 3 and len(scans) == 3
    photo(tmp_path / "train" / "n00000001" / "n00000001_9.JPEG", 9)
    assert listed() == [*names, "n00000001_9.JPEG"] and len(scans) == 4
    settle(tmp_path)
    assert len(listed()) == len(listed()) == 13 and len(scans) == 5
    (tmp_path / "train" / "n00000000" / "n00000000_0.JPEG").unlink()
    assert len(listed()) == 12 and len(scans) == 6
    deep = tmp_path / "train" / "new" / "deep" / "er"
    photo(deep / "n00000009_9.JPEG", 9)
    settle(tmp_path)
    assert len(listed()) == len(listed()) == 13 and len(scans) == 7
    photo(deep / "n00000009_8.JPEG", 9)
    assert len(listed()) == 14 and len(scans) == 8
    holdouts = [open_source(str(tmp_path), "holdout").names for _ in range(2)]
    assert holdouts[0] == holdouts[1] and len(list(own_cache.glob("photo_holdout-*.npz"))) == 1
    assert len(list(own_cache.glob("photo_list-*.npz"))) == 1 and len(list(own_cache.iterdir())) == 2


def test_cached_arrays(own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def make() -> dict[str, np.ndarray]:
        made.append(len(made))
        return {"a": np.arange(3) + len(made), "b": np.array(["x", "üü"])}

    first = cached_arrays("kind", {"root": tmp_path, "n": 1}, make)
    again = cached_arrays("kind", {"n": 1, "root": tmp_path}, make)
    assert (
        len(made) == 1
        and again["b"].tolist() == ["x", "üü"]
        and again["a"].tolist() == first["a"].tolist() == [1, 2, 3]
    )
    cached_arrays("kind", {"root": tmp_path, "n": 2}, make)
    assert len(made) == 2
    (file, _) = sorted(own_cache.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    content = file.read_bytes()
    for broken in (b"", b"text", content[: len(content) // 2], content[:60] + b"\0" * 40 + content[100:]):
        file.write_bytes(broken)
        before = len(made)
        assert cached_arrays("kind", {"root": tmp_path, "n": 1}, make)["a"][0] == before + 1
    assert cached_arrays("kind", {"root": tmp_path, "n": 1}, make)["a"][0] == len(made)
    assert cached_arrays("kind", {"root": tmp_path, "n": 1}, make, fresh=lambda old: False)["a"][0] == len(made)
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("UVIM_FSQ_CACHE", str(blocked))
    before = len(made)
    assert [cached_arrays("kind", {}, make)["a"][0] for _ in range(2)] == [before + 1, before + 2]


def test_full_disk_leaves_no_file(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    assert cached_arrays("kind", {}, lambda: {"a": np.ones(2)})["a"].tolist() == [1, 1]
    assert list(own_cache.iterdir()) == []


def test_place_of_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("UVIM_FSQ_CACHE", "~/elsewhere")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "elsewhere"
    monkeypatch.delenv("UVIM_FSQ_CACHE")
    assert cache_dir() == tmp_path / ".cache" / "uvim_fsq"
