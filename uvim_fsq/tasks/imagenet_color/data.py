"""Reads ImageNet in its common layouts, detected by content, and any folder of photos.

Every sample is an RGB photo without maps.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from uvim_fsq.data import splits
from uvim_fsq.data.cache import cached_arrays
from uvim_fsq.data.folders import IMAGE_SUFFIXES, has_split_folders, split_folder
from uvim_fsq.data.images import read_image
from uvim_fsq.data.roots import find_data_root
from uvim_fsq.data.sample import Sample
from uvim_fsq.data.saved_datasets import SavedRows, open_rows, read_photo
from uvim_fsq.errors import UserError
from uvim_fsq.tasks.imagenet_color.coltran import evaluation_names, reference_names

COLTRAN = {"coltran_evaluation": evaluation_names, "coltran_reference": reference_names}
SPLITS = (*splits.SPLITS, *COLTRAN)
#: In a folder without train/ and val/, every tenth photo belongs to the evaluation split.
VAL_STRIDE = 10
#: split -> number of photos in ImageNet.
OFFICIAL = {
    "train": 1_281_167,
    "val": 50_000,
    "holdout": splits.HOLDOUT,
    "train_minus_holdout": 1_281_167 - splits.HOLDOUT,
    **dict.fromkeys(COLTRAN, 5_000),
}
TRAIN_NAME = re.compile(r"n\d{8}_\d+\.jpe?g", re.IGNORECASE)
VAL_NAME = re.compile(r"ILSVRC2012_val_\d{8}\.jpe?g", re.IGNORECASE)
#: Where train/ and val/ may be, relative to data.root.
PLACES = ("", "CLS-LOC", "Data/CLS-LOC", "ILSVRC/Data/CLS-LOC")
#: Lists of at most this many photos are not cached.
CACHE_ABOVE = 20_000
#: A folder modified less than this before it was read may change again without a new modification time, because the
#: clocks of file systems are coarse.
SETTLED_NS = 2_000_000_000
ARCHIVES = (".tar", ".tgz", ".zip", ".parquet", ".arrow")


@dataclass(frozen=True, eq=False)
class Paths:
    """Many relative paths stored in two arrays, which are faster to send to loader processes than a list of strings.

    Attributes:
        data: (bytes,) uint8, all paths in UTF-8, concatenated.
        ends: (n,) int64, end of each path in `data`.
    """

    data: np.ndarray
    ends: np.ndarray

    @classmethod
    def of(cls, paths: Iterable[str]) -> Paths:
        encoded = [os.fsencode(path) for path in paths]
        ends = np.cumsum([len(path) for path in encoded], dtype=np.int64)
        return cls(np.frombuffer(b"".join(encoded), np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        return os.fsdecode(self.data[self.ends[index - 1] if index else 0 : self.ends[index]].tobytes())

    def sha256(self) -> str:
        return hashlib.sha256(self.data.tobytes() + self.ends.tobytes()).hexdigest()

    def __iter__(self) -> Iterator[str]:
        start, data = 0, self.data.tobytes()
        for end in self.ends.tolist():
            yield os.fsdecode(data[start:end])
            start = end


class PhotoSource:
    """The photos of one split. `meta["name"]` of a sample is the base name of its file.

    Attributes:
        root: absolute path of the data set; `open_source` finds the same photos there.
        info: layout, split, count, official_count (None unless it is ImageNet), root (its base name).
    """

    def __init__(self, root: Path, folder: str, paths: Paths, rows: np.ndarray, info: dict[str, Any]) -> None:
        """`rows`: indices into `paths`, which are relative to `root / folder`, in the order of the samples."""
        self.root, self.folder, self.info = root, folder, info
        self._paths, self._rows = paths, rows

    @property
    def names(self) -> list[str]:
        """The path of each photo relative to `root`, in order."""
        paths = list(self._paths)
        return [os.path.join(self.folder, paths[row]) for row in self._rows.tolist()]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        name = os.path.join(self.folder, self._paths[int(self._rows[index])])
        return Sample(name, read_image(self.root / name), {}, {"name": os.path.basename(name)})


@dataclass
class SavedPhotos:
    """Rows of a data set saved by the library `datasets`, of which only the photos are read."""

    rows: SavedRows
    info: dict[str, Any]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        (photo,), name = self.rows[index].values(), self.rows.name(index)
        return Sample(name, read_photo(photo, f"{self.rows.root}, {name}"), {}, {"name": name})


def list_photos(folder: Path) -> Paths:
    """The sorted paths of all photos below `folder`, found by extension, without hidden files; long lists are cached.

    Raises UserError if a folder cannot be read.
    """

    def make() -> dict[str, np.ndarray]:
        photos, times = _scan(folder)
        found, folders = Paths.of(photos), Paths.of(times)
        return {
            "data": found.data,
            "ends": found.ends,
            "folders": folders.data,
            "folder_ends": folders.ends,
            "times": np.array(list(times.values()), np.int64),
        }

    def fresh(arrays: dict[str, np.ndarray]) -> bool:
        # Adding or removing a photo changes its folder's modification time, so checking a thousand folders is enough.
        folders = Paths(arrays["folders"], arrays["folder_ends"])
        return all(_time(folder / name) == known for name, known in zip(folders, arrays["times"].tolist(), strict=True))

    arrays = cached_arrays("photo_list", {"root": str(folder)}, make, fresh, lambda new: len(new["ends"]) > CACHE_ABOVE)
    return Paths(arrays["data"], arrays["ends"])


def _time(folder: Path) -> int:
    try:
        return folder.stat().st_mtime_ns
    except OSError:
        return -1


def _scan(root: Path) -> tuple[list[str], dict[str, int]]:
    """All photos below `root`, sorted, and the modification time of each folder in ns (0 if too recent to rely on)."""
    photos: list[str] = []
    times: dict[str, int] = {}
    todo, linked = [""], {os.path.realpath(root)}
    settled = time.time_ns() - SETTLED_NS
    while todo:
        folder = todo.pop()
        changed = _time(root / folder)
        times[folder] = changed if changed < settled else 0
        try:
            with os.scandir(root / folder) as found:
                entries = sorted(found, key=lambda entry: entry.name)
            for entry in entries:
                # Skip hidden files and the resource forks that macOS adds to archives: ._NAME and __MACOSX/.
                if entry.name.startswith(".") or entry.name == "__MACOSX":
                    continue
                if entry.is_dir():
                    target = os.path.realpath(entry.path) if entry.is_symlink() else None
                    # Links may form a cycle.
                    if target not in linked:
                        todo.append(f"{folder}{entry.name}/")
                    if target is not None:
                        linked.add(target)
                elif os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES:
                    photos.append(folder + entry.name)
        except OSError as error:
            raise UserError(f"{root / folder} cannot be read ({error.strerror}); check its permissions") from error
    return sorted(photos), times


def _looks_like(paths: Paths, pattern: re.Pattern[str]) -> bool:
    probes = {0, len(paths) // 2, len(paths) - 1} if len(paths) else set()
    return bool(probes) and all(pattern.fullmatch(os.path.basename(paths[i])) for i in probes)


def _split_rows(split: str, paths: Paths, train: np.ndarray, val: np.ndarray, folder: Path) -> np.ndarray:
    """The rows of `paths` in a split: ColTran's lists in their own order, other splits sorted."""
    if split in COLTRAN:
        return _listed_rows(split, paths, folder)
    if split in ("train", "val"):
        return train if split == "train" else val
    holdout = _holdout(paths, train)
    return holdout if split == "holdout" else np.setdiff1d(train, holdout, assume_unique=True)


def _holdout(paths: Paths, train: np.ndarray) -> np.ndarray:
    """The held-out rows of `train`, chosen by base name, so that they are the same in any layout."""

    def make() -> dict[str, np.ndarray]:
        return {"mask": splits.holdout_mask([os.path.basename(paths[row]) for row in train.tolist()])}

    key = {"paths": paths.sha256(), "train": hashlib.sha256(train.tobytes()).hexdigest()}
    return train[cached_arrays("photo_holdout", key, make, keep=lambda _: len(paths) > CACHE_ABOVE)["mask"]]


def _listed_rows(split: str, paths: Paths, folder: Path) -> np.ndarray:
    rows = {os.path.basename(path): row for row, path in enumerate(paths)}
    wanted = COLTRAN[split]()
    missing = [name for name in wanted if name not in rows]
    if missing:
        raise UserError(
            f"{folder}: {len(missing)} of the {len(wanted)} photos of split {split} are missing, the first is "
            f"{missing[0]}; unpack all of ILSVRC2012_img_val.tar there, or use task.protocol=fid"
        )
    return np.array([rows[name] for name in wanted], np.int64)


def _no_photos(folder: Path) -> UserError:
    archives = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in ARCHIVES)
    hint = f"it holds {archives[0]}, unpack it first" if archives else "see datasets/README.md"
    return UserError(f"{folder}: no photos found ({' '.join(sorted(IMAGE_SUFFIXES))}); {hint}")


def _find(top: Path, split: str) -> tuple[str, Path, str]:
    """The layout, the folder of the data set, and the folder in it ("train", "val" or "") with the split's photos.

    Raises UserError if only the other folder exists, or if one is misnamed.
    """
    part = "val" if split == "val" or split in COLTRAN else "train"
    for place in PLACES:
        base = top / place
        if has_split_folders(base):
            split_folder(base, part)
            return "kaggle" if base.name == "CLS-LOC" else "train-val", base, part
    return "folder", top, ""


def open_saved(root: Path, split: str, column: str) -> SavedPhotos:
    """Opens a split of a data set that the library `datasets` saved in `root`; `column` is that of the photos."""
    rows = open_rows(root, split, (column,))
    return SavedPhotos(rows, {"layout": "datasets", "split": split, "count": len(rows), "root": root.name})


def open_source(root: str, split: str) -> PhotoSource:
    """Opens a split of the photos under `root`.

    Layouts: train/ and val/ with any photos, flat or in folders (such as ImageNet's own and Kaggle's tree); the
    ImageNet validation photos alone; any other folder of photos, of which every tenth is val and the others are train.
    Splits: train, val, holdout (4096 photos of train, or a tenth, by name), train_minus_holdout, and the two lists of
    the ColTran protocol.

    Raises UserError for an unknown split, a missing folder and a split without photos.
    """
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    top = Path(os.path.abspath(find_data_root(root)))
    if not top.is_dir():
        raise UserError(f"{top} is a file; unpack it and set data.root to the folder")
    layout, base, folder = _find(top, split)
    paths = list_photos(base / folder)
    if not len(paths):
        raise _no_photos(base / folder)
    layout, train, val, official = _parts(layout, folder, paths)
    chosen = _split_rows(split, paths, train, val, base / folder)
    if not len(chosen):
        raise UserError(_why_empty(base / folder, split, layout))
    info = {
        "layout": layout,
        "split": split,
        "count": len(chosen),
        "official_count": OFFICIAL[split] if official else None,
        "root": top.name,
    }
    return PhotoSource(base, folder, paths, chosen, info)


def _parts(layout: str, folder: str, paths: Paths) -> tuple[str, np.ndarray, np.ndarray, bool]:
    """The final name of the layout, the rows of train and of val, and whether the photos are ImageNet's."""
    rows = np.arange(len(paths))
    if folder:
        official = _looks_like(paths, TRAIN_NAME if folder == "train" else VAL_NAME)
        return "imagenet" if official and layout == "train-val" else layout, rows, rows, official
    if _looks_like(paths, VAL_NAME):
        # Nobody means to train on nine tenths of the ImageNet validation set.
        return "imagenet", rows[:0], rows, True
    return layout, rows[rows % VAL_STRIDE != 0], rows[::VAL_STRIDE], False


def _why_empty(folder: Path, split: str, layout: str) -> str:
    if layout == "imagenet":
        return f"{folder} holds only ImageNet's validation photos; split {split} needs train/ and val/ in one folder"
    return f"{folder}: too few photos, none left for split {split}; add some"
