"""Reads NYU Depth v2 in its common layouts, KITTI, and your own folders of images and depth maps, detected by content.

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

from uvim_fsq.data.folders import has_split_folders, split_folder
from uvim_fsq.data.names import inner_name
from uvim_fsq.data.roots import find_data_root
from uvim_fsq.data.sample import Sample, SampleSource
from uvim_fsq.data.saved_datasets import is_saved_dataset, open_rows
from uvim_fsq.errors import UserError
from uvim_fsq.tasks.nyu_depth.config import NYUDepthConfig
from uvim_fsq.tasks.nyu_depth.files import PairSource, SavedSource, h5_dataset, meters, one_line
from uvim_fsq.tasks.nyu_depth.kitti import SCALE as KITTI_SCALE
from uvim_fsq.tasks.nyu_depth.kitti import Drives, is_kitti
from uvim_fsq.tasks.nyu_depth.own import find_own, find_scenes, own_pairs
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


class LabeledMat:
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
        return Sample(name, image, {"depth": meters(depth, name)}, {"row": row})


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


def _kitti(root: Path, split: str, config: NYUDepthConfig) -> PairSource:
    part = "val" if split == "val" else "train"
    drives, file, skipped = Drives(root), _kitti_list(root, part, config), 0
    if file is not None:
        pairs, skipped = drives.listed(file)
    else:
        pairs = drives.annotated(part)
    if not pairs:
        where = f"{file} lists no image with a depth map" if file else f"{root} holds no annotated depth maps of {part}"
        raise UserError(f"{where}; expected data_depth_annotated/, see datasets/README.md, or set task.list_file")
    pairs = _take_split(split, pairs, pairs, set(range(0, len(pairs), HOLDOUT_STRIDE)))
    layout = "KITTI" if file is None else f"KITTI, {file.name}"
    info = {**_info(layout, split, "raw", len(pairs), root), "without_depth": skipped}
    return PairSource(root, pairs, info, config.depth_scale or KITTI_SCALE)


def _kitti_list(root: Path, part: str, config: NYUDepthConfig) -> Path | None:
    """The list of a part: `task.list_file`, or one in the root."""
    if config.list_file:
        return root / config.list_file.replace("{split}", part)
    return next(iter(sorted(root.glob("*test*files*.txt" if part == "val" else "*train*files*.txt"))), None)


def _folder(root: Path, split: str, config: NYUDepthConfig) -> PairSource:
    """Your own data, with or without folders train/ and val/."""
    part, own_split = "val" if split == "val" else "train", has_split_folders(root)
    found = own_pairs(split_folder(root, part) if own_split else root, config)
    rows = list(range(len(found.pairs)))
    if config.list_file:
        rows = _listed_rows(root / config.list_file.replace("{split}", part), [name for name, *_ in found.pairs])
    if not own_split and "{split}" not in config.list_file:
        # Without folders or lists of parts, every tenth image or scene belongs to the evaluation split.
        held_out = found.every_tenth(rows)
        rows = [row for row in rows if (row in held_out) == (part == "val")]
    if split in ("holdout", "train_minus_holdout"):
        held_out = found.every_tenth(rows)
        rows = [row for row in rows if (row in held_out) == (split == "holdout")]
    pairs = [found.pairs[row] for row in rows]
    info = _info("folder", split, "as given", len(pairs), root)
    return PairSource(root, pairs, info, config.depth_scale, masks=found.masks, shrink=True)


def _listed_rows(file: Path, names: list[str]) -> list[int]:
    """The rows of the images that a file lists in its lines, by name without extension or by the folder of a scene.

    Raises UserError for a missing file and for a line that names neither.
    """
    try:
        lines = [line.strip() for line in os.fsdecode(file.read_bytes()).splitlines() if line.strip()]
    except OSError as error:
        raise UserError(f"task.list_file: {file} cannot be read ({error.strerror})") from error
    below: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        for folder in (name, *map(str, Path(name).parents)):
            below.setdefault(folder, []).append(row)
    unknown = next((line for line in lines if line not in below), None)
    if unknown is not None or not lines:
        what = "nothing" if unknown is None else f"{unknown[:200]!r}, but there is no image or scene of that name"
        raise UserError(f"{file} lists {what}")
    return sorted({row for line in lines for row in below[line]})


def detect(root: Path, config: NYUDepthConfig | None = None) -> tuple[str, Path]:
    """Detects the layout of the data in `root` or in one of its folders, by content.

    Returns ("A" | "B" | "C" | "KITTI" | "folder", the root of the data). Raises UserError listing what it looked for.
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
        if is_kitti(place):
            return "KITTI", place
        if (place / "sync").is_dir() or (place / "official_splits").is_dir():
            return "C", place
        # For the folder that the user gave, accept half of the layout, so that the error can name what is missing.
        if own and (place == root or any((base / config.depth_dir).is_dir() for base in bases)):
            return "folder", place
        # A folder of scenes is one data set; a folder with a single one holds a data set.
        if place == root and len(places) > 2 and len(find_scenes(place, config, levels=1)) > 1:
            return "folder", place
    for place in sorted(places, key=lambda path: not has_split_folders(path)):
        if find_own(place, config):
            return "folder", place
    if has_split_folders(root):
        split_folder(root, "train")
    raise UserError(
        f"{root}: no depth data found. Looked for nyu_depth_v2_labeled.mat, train/**/*.h5 (FastDepth), sync/ and "
        "official_splits/ (BTS), 2011_09_26/ (KITTI), NAME_depth.npy next to images (DIODE), and "
        f"{config.image_dir}/ with {config.depth_dir}/ (own data; task.image_dir=, task.depth_dir=); see "
        "datasets/README.md"
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
    folder = find_data_root(root)
    if is_saved_dataset(folder):
        rows = open_rows(folder, split, (config.image_column, config.depth_column))
        return SavedSource(rows, _info("datasets", split, "as given", len(rows), folder), config.depth_scale)
    layout, place = detect(folder, config)
    if layout == "A":
        return LabeledMat(place, split, config.ground_truth)
    if layout == "B":
        return _fastdepth(place, split)
    return use_prepared(_decoded(layout, place, split, config))


def _decoded(layout: str, place: Path, split: str, config: NYUDepthConfig) -> PairSource:
    """Opens a layout of image files, which are slow to decode: C, KITTI or your own data."""
    if layout == "KITTI":
        return _kitti(place, split, config)
    return _bts(place, split) if layout == "C" else _folder(place, split, config)


def prepare(root: str, config: NYUDepthConfig, progress: Callable[[int, int], None]) -> str:
    """Converts the files of layout C and of your own data to .h5 and returns a one-line summary.

    Raises UserError for layouts A and B, which are HDF5 already.
    """
    layout, place = detect(find_data_root(root), config)
    if layout in ("A", "B"):
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
