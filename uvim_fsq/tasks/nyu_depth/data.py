"""Reads NYU Depth v2 in its common layouts, detected by content, and your own folders of images and depth maps.

Layouts of NYU Depth v2: A, the labeled .mat (HDF5); B, the FastDepth tree of .h5 files; C, the BTS tree of JPEG and
16-bit PNG files. Every adapter is a `SampleSource` with one map `depth`: (H, W) float32 meters, 0 where invalid.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import h5py
import numpy as np

from uvim_fsq.data.folders import IMAGE_SUFFIXES, and_list, files_by_stem, has_split_folders, split_folder
from uvim_fsq.data.names import inner_name
from uvim_fsq.data.roots import find_data_root
from uvim_fsq.data.sample import Sample, SampleSource
from uvim_fsq.errors import UserError
from uvim_fsq.tasks.nyu_depth.config import NYUDepthConfig
from uvim_fsq.tasks.nyu_depth.files import PairSource, h5_dataset, metres, one_line
from uvim_fsq.tasks.nyu_depth.prepared import use_prepared, write_prepared
from uvim_fsq.tasks.nyu_depth.splits_mat import read_splits

#: layout -> split -> official number of images.
OFFICIAL = {"A": {"train": 795, "val": 654}, "B": {"train": 47_584, "val": 654}, "C": {"train": 24_231, "val": 654}}
SPLITS = ("train", "val", "holdout", "train_minus_holdout")
#: The holdout of layouts A and C is every 20th training sample.
HOLDOUT_STRIDE = 20


def _info(layout: str, split: str, truth: str, count: int, root: Path) -> dict[str, Any]:
    official = OFFICIAL.get(layout, {}).get(split)
    return {
        "layout": layout,
        "split": split,
        "ground_truth": truth,
        "count": count,
        "official_count": official,
        "root": root.name,
    }


def _take_split(split: str, train: list[Any], val: list[Any], holdout: set[int]) -> list[Any]:
    if split == "val":
        return val
    if split == "train":
        return train
    keep = split == "holdout"
    return [item for i, item in enumerate(train) if (i in holdout) == keep]


class LabelledMat:
    """Layout A: nyu_depth_v2_labeled.mat and splits.mat (1-based). h5py sees MATLAB's axes in reverse order.

    `truth`: "raw" or "filled" depth maps.
    """

    def __init__(self, file: Path, split: str, truth: str) -> None:
        self.file, self.key = file, "rawDepths" if truth == "raw" else "depths"
        splits_file = file.with_name("splits.mat")
        train, val = read_splits(splits_file)
        with _open_h5(file) as handle:
            count = len(h5_dataset(handle, "images", file, 4))
            h5_dataset(handle, self.key, file, 3)
        rows = _take_split(split, train, val, set(range(0, len(train), HOLDOUT_STRIDE)))
        if rows and max(rows) >= count:
            raise UserError(f"{file} holds {count} images but {splits_file.name} lists number {max(rows) + 1}")
        self.rows = rows
        self.info = _info("A", split, truth, len(self.rows), file.parent)
        self._handle: h5py.File | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getstate__(self) -> dict[str, Any]:
        # An open file must not be sent to a loader process.
        return {**self.__dict__, "_handle": None}

    def __getitem__(self, index: int) -> Sample:
        row = self.rows[index]
        if self._handle is None:
            self._handle = _open_h5(self.file)
        try:
            # OpenCV merges and transposes many times faster than NumPy.
            image = cv2.transpose(cv2.merge(list(self._handle["images"][row])))  # type: ignore[index]
            depth = cv2.transpose(np.asarray(self._handle[self.key][row], np.float32))  # type: ignore[index]
        except OSError as error:
            raise UserError(
                f"{self.file}: image {row + 1} cannot be read ({one_line(error)}); download the file again"
            ) from error
        name = f"{self.file.name}#{row + 1}"
        return Sample(name, image, {"depth": metres(depth, name)}, {"row": row})


def _open_h5(path: Path) -> h5py.File:
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise UserError(f"{path} cannot be opened ({one_line(error)}); it is truncated or not an HDF5 file") from error


def _fastdepth(root: Path, split: str) -> PairSource:
    folder = split_folder(root, "val" if split == "val" else "train")
    files = sorted(folder.rglob("*.h5"))
    if not files:
        raise UserError(
            f"{folder} holds no .h5 files; the FastDepth tree needs train/<scene>/*.h5 and val/official/*.h5"
        )
    # FastDepth's holdout is part of train/.
    holdout = {i for i, file in enumerate(files) if file.stem in ("00001", "00201")}
    files = _take_split(split, files, files, holdout)
    pairs = [(str(file.relative_to(root)), file, file) for file in files]
    return PairSource(root, pairs, _info("B", split, "filled" if split == "val" else "raw", len(pairs), root))


def _bts(root: Path, split: str) -> PairSource:
    train_folder, test_folder = root / "sync", root / "official_splits" / "test"
    folder = test_folder if split == "val" else train_folder
    listed = sorted(root.glob("*test*files*.txt" if split == "val" else "*train*files*.txt"))
    if listed:
        pairs, skipped = _bts_list(listed[0], folder, root)
    else:
        images = sorted([*folder.rglob("rgb_*.jpg"), *folder.rglob("rgb_*.png")])
        pairs = [
            (str(i.relative_to(root)), i, i.with_name(f"sync_depth_{i.stem.removeprefix('rgb_')}.png")) for i in images
        ]
        skipped = 0
    if not pairs:
        raise UserError(
            f"{folder} holds no rgb_*.jpg; the BTS tree needs sync/<scene>/ and official_splits/test/<type>/"
        )
    holdout = set(range(0, len(pairs), HOLDOUT_STRIDE))
    pairs = _take_split(split, pairs, pairs, holdout)
    info = {**_info("C", split, "raw", len(pairs), root), "without_depth": skipped}
    return PairSource(root, pairs, info)


def _bts_list(file: Path, folder: Path, root: Path) -> tuple[list[tuple[str, Path, Path]], int]:
    """Reads lines `rgb depth focal` -> (id, image, depth) of each, and the number of lines without a depth map.

    Training paths begin with a slash, which is removed, because pathlib would drop the root.
    """
    pairs: list[tuple[str, Path, Path]] = []
    skipped = 0
    for line in os.fsdecode(file.read_bytes()).splitlines():
        parts = line.split()
        if len(parts) < 2 or "None" in parts[:2]:
            skipped += bool(parts)
            continue
        rgb, depth = (inner_name(part.lstrip("/"), file) for part in parts[:2])
        place = folder if (folder / rgb).exists() or not (root / rgb).exists() else root
        pairs.append((rgb, place / rgb, place / depth))
    return pairs, skipped


def _folder(root: Path, split: str, config: NYUDepthConfig) -> PairSource:
    """Your own data: ROOT[/train|/val]/<image_dir>/NAME.jpg and <depth_dir>/NAME.(png|npy|h5)."""
    own_split = has_split_folders(root)
    base = split_folder(root, "val" if split == "val" else "train") if own_split else root
    images, depths = base / config.image_dir, base / config.depth_dir
    for folder, key in ((images, "image_dir"), (depths, "depth_dir")):
        if not folder.is_dir():
            there = and_list(sorted(f"{path.name}/" for path in base.iterdir() if path.is_dir()))
            raise UserError(f"{base} holds {there or 'no folder'}, but no {folder.name}/; set task.{key} to its name")
    photos = files_by_stem(images, lambda path: path.suffix.lower() in IMAGE_SUFFIXES)
    maps = files_by_stem(depths, lambda path: path.is_file())
    missing = sorted(photos.keys() - maps.keys())
    if missing:
        raise UserError(f"{depths}: {len(missing)} images have no depth map, the first is {missing[0]}")
    if not photos:
        raise UserError(f"{images} holds no images")
    pairs = [(stem, image, maps[stem]) for stem, image in photos.items()]
    # Without train/ and val/ folders, every tenth image belongs to the evaluation split.
    train = pairs if own_split else [pair for i, pair in enumerate(pairs) if i % 10]
    pairs = _take_split(split, train, pairs if own_split else pairs[::10], set(range(0, len(train), 10)))
    return PairSource(root, pairs, _info("folder", split, "as given", len(pairs), root), config.depth_scale)


def detect(root: Path, config: NYUDepthConfig | None = None) -> tuple[str, Path]:
    """Detects the layout of the data in `root` or in one of its folders, by content.

    Returns ("A" | "B" | "C" | "folder", the root of the data). Raises UserError listing what it looked for.
    """
    config = config or NYUDepthConfig()
    places = [root]
    # train/ and val/ are not data sets of their own.
    if root.is_dir() and not has_split_folders(root):
        places += sorted(path for path in root.iterdir() if path.is_dir())
    for place in places:
        mat = _labeled_mat(place)
        if mat is not None:
            return "A", mat
        bases = [place, place / "train", place / "val"]
        own = any((base / config.image_dir).is_dir() for base in bases)
        if not own and any(next(base.rglob("*.h5"), None) for base in bases[1:]):
            return "B", place
        if (place / "sync").is_dir() or (place / "official_splits").is_dir():
            return "C", place
        # For the folder that the user gave, accept half of the layout, so that the error can name what is missing.
        if own and (place == root or any((base / config.depth_dir).is_dir() for base in bases)):
            return "folder", place
    if has_split_folders(root):
        split_folder(root, "train")
    raise UserError(
        f"{root}: no depth data found. Looked for nyu_depth_v2_labeled.mat, train/**/*.h5 (FastDepth), sync/ and "
        f"official_splits/ (BTS), {config.image_dir}/ with {config.depth_dir}/ (own data; task.image_dir=, "
        "task.depth_dir=); see datasets/README.md"
    )


def _labeled_mat(place: Path) -> Path | None:
    for mat in [place] if place.is_file() else sorted(place.glob("*.mat")):
        if h5py.is_hdf5(mat):
            with _open_h5(mat) as handle:
                if "images" in handle and "depths" in handle:
                    return mat
        elif mat.name == "nyu_depth_v2_labeled.mat":
            raise UserError(f"{mat} is truncated or not an HDF5 file; download it again (2.8 GB)")
    return None


def open_source(root: str, split: str, config: NYUDepthConfig) -> SampleSource:
    """The adapter for the data under `root`, whatever its layout.

    Splits: train, val (the official test images), holdout (a fixed part of train, for tuning) and train_minus_holdout.
    Raises UserError for an unknown split, and if no data is found or it is incomplete.
    """
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    layout, place = detect(find_data_root(root), config)
    if layout == "A":
        return LabelledMat(place, split, config.ground_truth)
    if layout == "B":
        return _fastdepth(place, split)
    return use_prepared(_decoded(layout, place, split, config))


def _decoded(layout: str, place: Path, split: str, config: NYUDepthConfig) -> PairSource:
    """Opens a layout of image files, which are slow to decode: C or your own data."""
    return _bts(place, split) if layout == "C" else _folder(place, split, config)


def prepare(root: str, config: NYUDepthConfig, progress: Callable[[int, int], None]) -> str:
    """Converts the files of layout C and of your own data to .h5 and returns a one-line summary.

    Raises UserError for layouts A and B, which are HDF5 already.
    """
    layout, place = detect(find_data_root(root), config)
    if layout in "AB":
        raise UserError(f"{place} is HDF5 already (layout {layout}) and loads fast; there is nothing to prepare")
    sources: list[PairSource] = []
    missing: list[str] = []
    for split in ("train", "val"):
        try:
            sources.append(_decoded(layout, place, split, config))
        except UserError as error:
            missing.append(f"{split} was skipped: {error}")
    if not sources:
        raise UserError("; ".join(missing))
    return "; ".join([write_prepared(sources, progress), *missing])
