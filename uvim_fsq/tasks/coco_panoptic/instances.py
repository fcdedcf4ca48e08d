"""Reads COCO instance annotations (polygons and RLE) and paints the masks of an image into one map.

All masks are converted to compressed RLE by pycocotools when the file is read; large files are read once and cached.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from uvim_fsq.console import say
from uvim_fsq.data.cache import cached_arrays
from uvim_fsq.data.images import check_pixels
from uvim_fsq.data.names import inner_name
from uvim_fsq.errors import UserError
from uvim_fsq.tasks.coco_panoptic import index as index_module
from uvim_fsq.tasks.coco_panoptic.index import Index, category_numbers, category_tables, flag, read_tree

#: A polygon may lie outside of its image by this many image sides; the memory to draw it grows with its length.
MAX_SIDES = 10


def coco_masks() -> ModuleType:
    """The module `pycocotools.mask`. Raises UserError if it is not installed."""
    try:
        return importlib.import_module("pycocotools.mask")
    except ImportError:
        raise UserError("instance masks are read by pycocotools: pip install 'uvim-fsq[coco]'") from None


@dataclass(frozen=True)
class InstanceIndex(Index):
    """One file of instance annotations: N images ordered by id, M annotations.

    The annotations of an image are in the order in which they are painted, see `paint_order`. `classes`, `crowd`,
    `first` and the categories are as in `Index`; all categories are things. `ids` counts the annotations of each image
    from 1; `pngs` are the names of prepared labels.

    Attributes:
        masks: uint8, the compressed RLE of all masks, one after another.
        ends: (M + 1,) int64; the RLE of annotation i is masks[ends[i]:ends[i + 1]].
        sizes: (N, 2) int64 height and width of each image.
        given_areas: (M,) float64 areas as given in the JSON, of the mask if missing.
        without_mask: number of annotations without a mask; they are left out.
    """

    masks: np.ndarray
    ends: np.ndarray
    sizes: np.ndarray
    given_areas: np.ndarray
    without_mask: int

    def rle(self, row: int, annotation: int) -> dict[str, Any]:
        """The mask of an annotation of image `row`, as pycocotools takes it."""
        counts = self.masks[int(self.ends[annotation]) : int(self.ends[annotation + 1])].tobytes()
        return {"size": [int(side) for side in self.sizes[row]], "counts": counts}

    def paint(self, row: int) -> np.ndarray:
        """(H, W) int32: the number 1..K of the topmost annotation at each pixel of an image, 0 for background."""
        decode = coco_masks().decode
        numbers = np.zeros(tuple(self.sizes[row]), np.int32)
        for number, annotation in enumerate(range(int(self.first[row]), int(self.first[row + 1])), start=1):
            numbers[decode(self.rle(row, annotation)).view(bool)] = number
        return numbers


def read_instances(file: Path) -> InstanceIndex:
    """The index of an instances JSON file. Raises UserError if the file is missing, invalid or inconsistent."""
    return _read(file, *index_module.file_stamp(file))


@functools.lru_cache(maxsize=4)
def _read(file: Path, mtime: int, size: int) -> InstanceIndex:
    coco_masks()
    if size < index_module.CACHE_FROM:
        arrays = _parse(file)
    else:
        key = {"file": str(file.resolve()), "mtime": mtime, "size": size, "version": 1}
        arrays = cached_arrays("instances_index", key, lambda: _parse_large(file))
    counts = {name: int(arrays[name]) for name in ("without_annotation", "without_mask")}
    return InstanceIndex(file=file, **{**arrays, **counts})


def _parse_large(file: Path) -> dict[str, np.ndarray]:
    say(f"{file}: reading the masks, once; the 860,000 of COCO's training set take about two minutes")
    return _parse(file)


def _parse(file: Path) -> dict[str, np.ndarray]:
    needs = "images need id, file_name, height, width; annotations image_id, category_id, segmentation"
    with index_module.valid_entries(file, "COCO", needs):
        return _tables(file, read_tree(file, "an instance"))


def _tables(file: Path, tree: Mapping[str, Any]) -> dict[str, np.ndarray]:
    categories = tree["categories"]
    number = category_numbers(file, categories)
    images = _images(file, tree["images"])
    found: dict[Any, list[_Annotation]] = {image_id: [] for image_id in images}
    without_mask = 0
    for position, entry in enumerate(tree["annotations"]):
        what = f"{file}: annotation {entry.get('id', position)}"
        if entry["image_id"] not in images:
            raise UserError(f"{what} refers to image {entry['image_id']}, missing from `images`; remove it")
        if int(entry["category_id"]) not in number:
            raise UserError(f"{what} has category {entry['category_id']}, which `categories` does not list")
        height, width = images[entry["image_id"]][1]
        counts = encode_mask(entry.get("segmentation"), height, width, what)
        if counts is None:
            without_mask += 1
            continue
        crowd = flag(file, {"id": position, **entry}, "iscrowd")
        found[entry["image_id"]].append(_Annotation.of(entry, counts, number, crowd, height, width, what))
    if without_mask and without_mask == len(tree["annotations"]):
        raise UserError(f"{file} holds boxes only; its annotations need masks (`segmentation`: polygons or RLE)")
    order = sorted(images)
    rows = [paint_order(found[image_id]) for image_id in order]
    ordered = [annotation for row in rows for annotation in row]
    lengths = [len(annotation.counts) for annotation in ordered]
    return {
        "image_ids": np.array(order, np.int64 if isinstance(order[0], int) else np.str_),
        "images": np.array([images[image_id][0] for image_id in order], np.str_),
        "pngs": np.array([f"{images[image_id][0]}.png" for image_id in order], np.str_),
        "first": np.cumsum([0, *map(len, rows)], dtype=np.int64),
        "ids": np.array([i + 1 for row in rows for i in range(len(row))], np.int64),
        "classes": np.array([annotation.number for annotation in ordered], np.int64),
        "areas": np.array([annotation.pixels for annotation in ordered], np.int64),
        "crowd": np.array([annotation.crowd for annotation in ordered], np.bool_),
        "is_thing": np.ones(len(categories), np.bool_),
        "without_annotation": np.array(sum(not row for row in rows)),
        "masks": np.frombuffer(b"".join(annotation.counts for annotation in ordered), np.uint8),
        "ends": np.cumsum([0, *lengths], dtype=np.int64),
        "sizes": np.array([images[image_id][1] for image_id in order], np.int64).reshape(-1, 2),
        "given_areas": np.array([annotation.area for annotation in ordered], np.float64),
        "without_mask": np.array(without_mask),
        **category_tables(categories),
    }


def _images(file: Path, entries: Sequence[Mapping[str, Any]]) -> dict[Any, tuple[str, tuple[int, int]]]:
    """Image id -> file name and (height, width)."""
    images: dict[Any, tuple[str, tuple[int, int]]] = {}
    for entry in entries:
        name, size = inner_name(entry["file_name"], file), (entry["height"], entry["width"])
        if any(type(side) is not int or side < 1 for side in size):
            raise UserError(f"{file}: the image {name} has height {size[0]!r} and width {size[1]!r}; give its pixels")
        check_pixels(size[1], size[0], f"{file}: {name}")
        images[entry["id"]] = name, size
    if len(images) != len(entries):
        raise UserError(f"{file}: {len(entries) - len(images)} entries of `images` repeat an image id; remove them")
    for repeated, times in Counter(name for name, _ in images.values()).most_common(1):
        if times > 1:
            raise UserError(f"{file}: {times} entries of `images` name the file {repeated}; remove all but one")
    if not images:
        raise UserError(f"{file} holds no images")
    return images


@dataclass(frozen=True)
class _Annotation:
    counts: bytes
    number: int
    crowd: bool
    pixels: int
    area: float

    @classmethod
    def of(
        cls,
        entry: Mapping[str, Any],
        counts: bytes,
        number: Mapping[int, int],
        crowd: bool,
        height: int,
        width: int,
        what: str,
    ) -> _Annotation:
        pixels = int(coco_masks().area({"size": [height, width], "counts": counts}))
        area = entry.get("area")
        area = float(pixels if area is None else area)
        if not 0 <= area < math.inf:
            raise UserError(f"{what} has the area {area}; give its pixels, or leave `area` out")
        return cls(counts, number[int(entry["category_id"])], crowd, pixels, area)


def paint_order(annotations: Iterable[_Annotation]) -> list[_Annotation]:
    """The annotations of one image from bottom to top.

    Instance masks may overlap, a label map cannot. Where they do, the one with fewer pixels lies on top: a small thing
    that overlaps a large one is mostly in front of it or part of it (a tie, a cup on a table), and the large one still
    shows beside it, whereas the small one would vanish. Crowd regions, which are drawn coarsely around many things, lie
    below all instances. Of equal areas, the one that the file lists later is on top.
    """
    return sorted(annotations, key=lambda annotation: (not annotation.crowd, -annotation.pixels))


# ---------------------------------------------------------------- masks


def encode_mask(segmentation: Any, height: int, width: int, what: str) -> bytes | None:
    """A `segmentation` of the JSON -> compressed RLE of (height, width); None if it is empty.

    Args:
        segmentation: a list of polygons [x1, y1, x2, y2, ...], or {"size": [height, width], "counts": ...} with a list
            of run lengths or their compressed text. Polygons of fewer than three points are ignored.
        height, width: of the image.
        what: names the annotation in messages.

    Raises:
        UserError: a polygon is not finite or lies far outside, or the runs do not cover the image. pycocotools would
            take all memory for the former and return arbitrary pixels for the latter.
    """
    masks = coco_masks()
    if isinstance(segmentation, dict):
        size, counts = segmentation["size"], segmentation["counts"]
        if list(size) != [height, width]:
            raise UserError(f"{what} has a mask of {size} in an image of {[height, width]}; they must agree")
        runs = compressed_runs(counts.encode()) if isinstance(counts, str) else np.array(counts)
        pixels = height * width
        whole = runs.dtype.kind in "iu" and runs.min(initial=0) >= 0 and runs.max(initial=0) <= pixels
        if not whole or runs.sum() != pixels:
            raise UserError(f"{what} has a damaged RLE: its runs must be whole numbers that add up to {pixels}")
        if isinstance(counts, str):
            return counts.encode()
        return masks.frPyObjects({"size": [height, width], "counts": runs.tolist()}, height, width)["counts"]
    polygons = [polygon for polygon in _polygons(segmentation, what) if len(polygon) >= 6]
    limit = MAX_SIDES * max(height, width)
    for polygon in polygons:
        # NaN fails every comparison.
        if len(polygon) % 2 or not np.all(np.abs(polygon) <= limit):
            raise UserError(f"{what} has a polygon of {len(polygon)} numbers, not pairs (x, y) in or near its image")
    if not polygons:
        return None
    return masks.merge(masks.frPyObjects([polygon.tolist() for polygon in polygons], height, width))["counts"]


def _polygons(segmentation: Any, what: str) -> list[np.ndarray]:
    if segmentation is None:
        return []
    if not isinstance(segmentation, list) or not all(isinstance(polygon, list) for polygon in segmentation):
        raise UserError(f"{what}: `segmentation` must be a list of polygons [[x1, y1, ...], ...] or an RLE")
    return [np.array(polygon, np.float64).reshape(-1) for polygon in segmentation]


def compressed_runs(text: bytes) -> np.ndarray:
    """The run lengths in a compressed RLE, (R,) int64; an array of one -1 if it is damaged.

    Each character holds five bits of a number, and whether more follow. Numbers are signed; from the fourth on, they
    are differences to the number before the last (COCO API, maskApi.c).
    """
    damaged = np.array([-1])
    values = np.frombuffer(text, np.uint8).astype(np.int64) - 48
    if not len(values) or values.min() < 0 or values.max() > 63 or values[-1] & 32:
        return damaged
    ends = np.flatnonzero(values & 32 == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > 7:  # 35 bits; a run is at most the pixels of an image
        return damaged
    place = np.arange(len(values)) - np.repeat(starts, lengths)
    numbers = np.add.reduceat((values & 31) << (5 * place), starts)
    numbers -= (values[ends] >> 4 & 1) << (5 * lengths)
    numbers[1::2] = np.cumsum(numbers[1::2])
    numbers[2::2] = np.cumsum(numbers[2::2])
    return numbers
