"""Reads COCO, Cityscapes and ADE20K panoptic, COCO instances, and any data set in these formats (`layouts.py`).

A Sample's map `segments`, (H, W) int32, numbers the segments of the image 1..K in the order of the index; 0 is void, or
background with instances. `meta["segments"]` is the ground truth for scoring. Both come from the PNGs (in a folder or
still zipped), from the masks in an instances JSON, or from the compact copies that `uvim-fsq data prepare` writes.
"""

from __future__ import annotations

import functools
import hashlib
import os
import warnings
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from uvim_fsq.data.arrays import MAX_RATIO
from uvim_fsq.data.decoded import decoded
from uvim_fsq.data.images import decode_png, read_image
from uvim_fsq.data.roots import find_data_root
from uvim_fsq.data.sample import Sample
from uvim_fsq.data.splits import SPLITS, split_rows
from uvim_fsq.errors import UserError
from uvim_fsq.files import inside, read_json, write_json, write_whole
from uvim_fsq.tasks.coco_panoptic.config import CocoPanopticConfig
from uvim_fsq.tasks.coco_panoptic.index import Index, read_index
from uvim_fsq.tasks.coco_panoptic.instances import InstanceIndex, read_instances
from uvim_fsq.tasks.coco_panoptic.layouts import find_annotations, find_photos, photo_name
from uvim_fsq.tasks.coco_panoptic.segments import Segments, rgba_to_ids, segment_index

PREPARED = "prepared_panoptic"


@dataclass
class PngStore:
    """The id PNGs of one split: files in a folder, or members (with `prefix`) of a zip file that is read directly."""

    place: Path
    prefix: str = ""
    _zip: zipfile.ZipFile | None = field(default=None, repr=False)
    _owner: int = 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_zip": None}

    def file(self, name: str) -> Path:
        """The file that holds the PNG `name`."""
        return self.place if self.place.is_file() else self.place / name

    def read(self, name: str) -> bytes:
        """The content of the PNG `name`. Raises UserError if it is missing or damaged."""
        try:
            if self.place.is_dir():
                return (self.place / name).read_bytes()
            # Reopen the file in each loader process: after a fork, both processes would share one file position.
            if self._zip is None or self._owner != os.getpid():
                self._zip, self._owner = zipfile.ZipFile(self.place), os.getpid()
            member = self._zip.getinfo(self.prefix + name)
            if member.file_size > 1_000_000 + MAX_RATIO * member.compress_size:
                raise UserError(f"{self.place}: {name} unpacks to {member.file_size} bytes; it is not a label PNG")
            return self._zip.read(member)
        except (FileNotFoundError, KeyError):
            raise UserError(f"{self.place / name}: no such PNG, but the annotation file lists it") from None
        except (OSError, zipfile.BadZipFile, zlib.error, RuntimeError, MemoryError) as error:
            raise UserError(f"{self.place}: {name} cannot be read ({error}); replace it") from error


def find_pngs(root: Path, annotations: Path) -> PngStore:
    """Finds the id PNGs next to the JSON file or the images, in a folder or zipped. Raises UserError if missing."""
    stem = annotations.stem
    for place in (annotations.parent / stem, root / stem, root / "annotations" / stem):
        if place.is_dir():
            return PngStore(place)
    for place in (annotations.with_suffix(".zip"), root / f"{stem}.zip", root / "annotations" / f"{stem}.zip"):
        if place.is_file():
            try:
                with zipfile.ZipFile(place) as archive:
                    first = next((name for name in archive.namelist() if name.endswith(".png")), "")
            except zipfile.BadZipFile as error:
                raise UserError(f"{place} is truncated or not a zip file ({error}); download it again") from error
            return PngStore(place, first[: first.rfind("/") + 1])
    raise UserError(
        f"{annotations} exists, but its PNGs do not: looked for {stem}/ next to it, {root / stem}/ and {stem}.zip"
    )


def decode_ids(data: bytes, name: str) -> np.ndarray:
    """An id PNG -> (H, W) int32, R + 256 G + 65536 B. Raises UserError for anything but 8-bit RGB."""
    pixels = decode_png(data, name)
    if pixels is None:
        raise UserError(f"{name} cannot be read as a PNG; replace it")
    if pixels.dtype != np.uint8 or pixels.ndim != 3:
        kind = f"{pixels.dtype.itemsize * 8}-bit, {1 if pixels.ndim == 2 else pixels.shape[2]} channels"
        raise UserError(f"{name} is {kind}; panoptic PNGs are 8-bit RGB with id = R + 256 G + 65536 B")
    code = cv2.COLOR_BGRA2RGBA if pixels.shape[2] == 4 else cv2.COLOR_BGR2RGBA
    return rgba_to_ids(cv2.cvtColor(pixels, code))


def number_segments(ids: np.ndarray, segment_ids: np.ndarray, name: str) -> np.ndarray:
    """(H, W) 24-bit ids -> (H, W) int32 positions in `segment_ids` plus 1; 0 stays void.

    Raises UserError if a pixel's id is not listed.
    """
    numbers = segment_index(ids, segment_ids)
    if int(numbers.min(initial=0)) < 0:
        missing = np.unique(ids[numbers < 0])
        raise UserError(
            f"{name} holds {len(missing)} segment ids that the annotation file does not list, e.g. {missing[0]}; "
            "PNG and JSON belong to different versions"
        )
    return numbers


class PanopticSource:
    """One split of a data set with panoptic or instance annotations.

    Attributes:
        instances: whether unlabeled pixels are background (everything was annotated that is an instance), not void.
    """

    def __init__(self, root: Path, split: str, config: CocoPanopticConfig) -> None:
        self.official_split = "val" if split == "val" else "train"
        self.root, self.config = root, config
        layout, self.annotations = find_annotations(root, self.official_split, config.annotations)
        self.instances = layout.instances
        self.index = read_instances(self.annotations) if layout.instances else read_index(self.annotations)
        _check_categories(self.index, config)
        self.photos = find_photos(root, self.annotations, config.image_dir, self.official_split)
        self.names = photo_names(self.index)
        self.prepared = _prepared_folder(root, self.annotations, self.index)
        self.pngs = PngStore(self.prepared) if self.prepared else None
        if self.pngs is None and not layout.instances:
            self.pngs = find_pngs(root, self.annotations)
        self.rows = split_rows(split, self.names)
        crowded = int((np.diff(self.index.first)[self.rows] > config.max_instances).sum())
        if crowded:
            warnings.warn(
                f"{crowded} of {len(self.rows)} images of {self.annotations.name} have more than "
                f"{config.max_instances} segments; the largest are kept as labels",
                stacklevel=2,
            )
        full = self.official_split == split and len(self.index.category_ids) == layout.classes
        self.info: dict[str, Any] = {
            "layout": layout.name + (" (prepared labels)" if self.prepared else ""),
            "split": split,
            "count": len(self.rows),
            "official_count": layout.official.get(self.annotations.stem) if full else None,
            "root": root.name,
            "annotations": self.annotations.name,
            "classes": len(self.index.category_ids),
            "images_without_annotation": self.index.without_annotation,
            f"images_over_{config.max_instances}_segments": crowded,
        }
        if isinstance(self.index, InstanceIndex):
            self.info["annotations_without_mask"] = self.index.without_mask

    def __len__(self) -> int:
        return len(self.rows)

    def unpacked_pngs(self) -> Path | None:
        """The folder of the original id PNGs, None where they are still zipped."""
        place = find_pngs(self.root, self.annotations).place
        return place if place.is_dir() else None

    def _numbers(self, row: int) -> np.ndarray:
        """(H, W) int32: the number of each pixel's segment, by its position in the index."""
        if self.pngs is None:
            assert isinstance(self.index, InstanceIndex)
            return self.index.paint(row)
        png = str(self.index.pngs[row])
        data, name = self.pngs.read(png), str(self.pngs.place / png)
        if self.prepared:
            return decode_prepared(data, name)
        part = slice(int(self.index.first[row]), int(self.index.first[row + 1]))
        return number_segments(decode_ids(data, name), self.index.ids[part], name)

    def __getitem__(self, index: int) -> Sample:
        row = int(self.rows[index])
        part = slice(int(self.index.first[row]), int(self.index.first[row + 1]))
        photo, png = self.photos / self.names[row], str(self.index.pngs[row])
        image = read_image(photo)
        file = self.annotations if self.pngs is None else self.pngs.file(png)
        how = ["segments", png, self.index.ids[part].tolist()]
        numbers = decoded(file, np.int32, how, lambda: self._numbers(row))
        if image.shape[:2] != numbers.shape:
            label = f"its mask in {self.annotations.name}" if self.instances else f"its PNG {png}"
            raise UserError(
                f"{photo} is {image.shape[0]} x {image.shape[1]} but {label} "
                f"is {numbers.shape[0]} x {numbers.shape[1]}; they belong to different versions"
            )
        classes, crowd = self.index.classes[part].astype(np.int32), self.index.crowd[part]
        truth = Segments(numbers, np.arange(1, len(classes) + 1), classes, crowd)
        if self.instances:
            truth = truth.present()  # without instances that others cover
        meta = {
            "segments": truth,
            "areas": self.index.areas[part],
            "image_id": self.index.image_ids[row].item(),
            "png": png,
        }
        return Sample(self.names[row], image, {"segments": truth.ids}, meta)


def photo_names(index: Index) -> list[str]:
    """The paths of the images in their folder, in the order of the index. Raises UserError if one leads out of it."""
    ids = map(str, index.image_ids)
    return [photo_name(one, str(name), index.file) for one, name in zip(ids, index.images, strict=True)]


def _check_categories(index: Index, config: CocoPanopticConfig) -> None:
    expected, found = config.categories, index.categories
    if expected and expected != found:
        first = next((f"{a} and {b}" for a, b in zip(expected, found, strict=False) if a != b), "their number")
        raise UserError(
            f"{index.file} has different categories than this configuration or checkpoint "
            f"({len(found)} and {len(expected)}; first difference: {first})"
        )


def open_source(root: str, split: str, config: CocoPanopticConfig) -> PanopticSource:
    """Opens a split: train, val, holdout (4096 images of train, by md5 of the file name) or train_minus_holdout.

    Raises UserError for an unknown split, missing or damaged files, and categories that differ from `config`.
    """
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    return PanopticSource(find_data_root(root), split, config)


# ---------------------------------------------------------------- prepared labels


def _prepared_state(folder: Path, annotations: Path, index: Index) -> str:
    """ "complete", "begun" or "none". Raises UserError if the folder belongs to another annotation file."""
    try:
        source = read_json(folder / "source.json", f"delete {folder} and run `uvim-fsq data prepare` again")
    except FileNotFoundError:
        return "none"
    if source != _fingerprint(annotations, index):
        raise UserError(f"{folder} was prepared from a different {annotations.name}; delete that folder")
    return "complete" if (folder / "complete").is_file() else "begun"


def _fingerprint(annotations: Path, index: Index) -> dict[str, Any]:
    digest = hashlib.sha256()
    masks = (index.masks,) if isinstance(index, InstanceIndex) else ()
    for array in (index.first, index.ids, index.pngs, *masks):
        digest.update(np.ascontiguousarray(array).tobytes())
    return {"version": 2, "annotations": annotations.name, "segments_sha256": digest.hexdigest()}


def _prepared_name(root: Path, annotations: Path) -> str:
    """The file's name; with its folder if every split has a file of the same name."""
    own = annotations.name == "_annotations.coco.json" and annotations.parent != root
    return f"{annotations.parent.name}{annotations.stem}" if own else annotations.stem


def _prepared_folder(root: Path, annotations: Path, index: Index) -> Path | None:
    folder = root / PREPARED / _prepared_name(root, annotations)
    return folder if _prepared_state(folder, annotations, index) == "complete" else None


def decode_prepared(data: bytes, name: str) -> np.ndarray:
    """A prepared label PNG (8 or 16 bits, grayscale) -> (H, W) int32 segment numbers. Raises UserError if damaged."""
    pixels = decode_png(data, name)
    if pixels is None or pixels.ndim != 2:
        raise UserError(f"{name} is damaged; delete its folder and run `uvim-fsq data prepare` again")
    return pixels.astype(np.int32)


def prepare(root: str, progress: Callable[[int, int], None], kind: str = "auto") -> str:
    """Writes the id maps of both splits as grayscale PNGs of segment numbers, which decode three times as fast.

    Can be interrupted and restarted; a split is used only when it is complete. Returns a one-line summary.
    `kind` is `task.annotations`.
    """
    place = find_data_root(root)
    done: list[str] = []
    for split in ("train", "val"):
        layout, annotations = find_annotations(place, split, kind)
        index = read_instances(annotations) if layout.instances else read_index(annotations)
        folder = place / PREPARED / _prepared_name(place, annotations)
        if _prepared_state(folder, annotations, index) != "complete":
            write_json(folder / "source.json", _fingerprint(annotations, index), indent=None)
            pngs = None if layout.instances else find_pngs(place, annotations)
            _prepare_split(pngs, index, folder, progress)
            write_whole(folder / "complete", Path.touch)
        done.append(f"{len(index.image_ids)} {split}")
    return f"prepared labels of {' and '.join(done)} images in {place / PREPARED}"


def _prepare_split(pngs: PngStore | None, index: Index, folder: Path, progress: Callable[[int, int], None]) -> None:
    for row, name in enumerate(map(str, index.pngs)):
        progress(row, len(index.pngs))
        target = folder / name
        if target.is_file():
            continue
        ids = index.ids[int(index.first[row]) : int(index.first[row + 1])]
        if pngs is None:
            assert isinstance(index, InstanceIndex)
            numbers = index.paint(row)
        else:
            place = str(pngs.place / name)
            numbers = number_segments(decode_ids(pngs.read(name), place), ids, place)
        ok, png = cv2.imencode(".png", numbers.astype(np.uint8 if len(ids) < 256 else np.uint16))
        assert ok
        write_whole(inside(folder, target), functools.partial(Path.write_bytes, data=png.tobytes()), durable=False)
    progress(len(index.pngs), len(index.pngs))
