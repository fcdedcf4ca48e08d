"""Reads a panoptic annotation file into flat arrays and validates it; large files are parsed once and cached."""

from __future__ import annotations

import contextlib
import functools
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from uvim_fsq.data.cache import cached_arrays
from uvim_fsq.data.names import inner_name
from uvim_fsq.errors import UserError

#: Smaller files, in bytes, are not cached.
CACHE_FROM = 20_000_000
#: Longer names of categories are cut, in characters.
LONGEST_NAME = 80


@dataclass(frozen=True)
class Index:
    """One annotation file: N images ordered by id, M segments, C categories in the file's order.

    Attributes:
        file: the JSON file.
        image_ids: (N,) int64, or str if the file uses names as ids (Cityscapes).
        images, pngs: (N,) str, file names of image and id map.
        first: (N + 1,) int64; the segments of image i are first[i]..first[i + 1] - 1.
        ids: (M,) int64 24-bit ids of the segments in the PNG.
        classes: (M,) int64, 1..C in the order of the file's categories.
        areas: (M,) int64 pixels as given in the JSON, -1 if missing. crowd: (M,) bool.
        category_ids: (C,) int64. category_names: (C,) str. is_thing: (C,) bool.
        colors: (C, 3) uint8 RGB of the categories, (0, 3) unless the file gives one to each of them.
        without_annotation: number of images without an annotation; they are left out.
    """

    file: Path
    image_ids: np.ndarray
    images: np.ndarray
    pngs: np.ndarray
    first: np.ndarray
    ids: np.ndarray
    classes: np.ndarray
    areas: np.ndarray
    crowd: np.ndarray
    category_ids: np.ndarray
    category_names: np.ndarray
    is_thing: np.ndarray
    colors: np.ndarray
    without_annotation: int

    @property
    def categories(self) -> tuple[tuple[int, str, bool], ...]:
        """(id, name, is a thing) of each category; class c of the labels is entry c - 1."""
        rows = zip(self.category_ids, self.category_names, self.is_thing, strict=True)
        return tuple((int(i), str(name), bool(thing)) for i, name, thing in rows)


def read_index(file: Path) -> Index:
    """The index of a panoptic JSON file. Raises UserError if the file is missing, invalid or inconsistent."""
    return _read(file, *file_stamp(file))


def file_stamp(file: Path) -> tuple[int, int]:
    """Time of the last change in ns, and size. Raises UserError if the annotation file is missing."""
    try:
        stat = file.stat()
    except OSError:
        raise UserError(f"{file}: no such annotation file") from None
    return stat.st_mtime_ns, stat.st_size


@functools.lru_cache(maxsize=4)
def _read(file: Path, mtime: int, size: int) -> Index:
    if size < CACHE_FROM:
        arrays = _parse(file)
    else:
        # Version 1 was written without checking file names, version 2 has no colors.
        key = {"file": str(file.resolve()), "mtime": mtime, "size": size, "version": 3}
        arrays = cached_arrays("panoptic_index", key, lambda: _parse(file))
    return Index(file=file, **{**arrays, "without_annotation": int(arrays["without_annotation"])})


def read_tree(file: Path, kind: str) -> dict[str, Any]:
    """The content of an annotation file of `kind`. Raises UserError if it is no JSON or lacks one of COCO's lists."""
    try:
        tree = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not valid JSON ({error}); it is truncated or damaged, replace it") from error
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror})") from error
    keys = ("images", "annotations", "categories")
    if not isinstance(tree, dict) or any(not isinstance(tree.get(key), list) for key in keys):
        raise UserError(f"{file} is not {kind} annotation file: it needs the lists {', '.join(keys)}")
    return tree


def _parse(file: Path) -> dict[str, np.ndarray]:
    needs = "images need id, file_name; annotations image_id, file_name, segments_info; segments id, category_id"
    with valid_entries(file, "COCO panoptic", needs):
        return _tables(file, read_tree(file, "a panoptic"))


@contextlib.contextmanager
def valid_entries(file: Path, name: str, needs: str) -> Iterator[None]:
    """Raises UserError, saying what entries need, if the block meets an invalid entry of a file in this format."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{file}: an entry has a missing or invalid field of the {name} format ({error!r}); {needs}"
        ) from error


def _tables(file: Path, tree: Mapping[str, Any]) -> dict[str, np.ndarray]:
    categories = tree["categories"]
    number = category_numbers(file, categories)
    images = {image["id"]: image for image in tree["images"]}
    annotations = {annotation["image_id"]: annotation for annotation in tree["annotations"]}
    for name, table, rows in (("image id", images, "images"), ("image_id", annotations, "annotations")):
        if len(table) != len(tree[rows]):
            raise UserError(f"{file}: {len(tree[rows]) - len(table)} entries of `{rows}` repeat an {name}; remove them")
        for repeated, times in Counter(entry["file_name"] for entry in table.values()).most_common(1):
            if times > 1:
                raise UserError(f"{file}: {times} entries of `{rows}` name the file {repeated}; remove all but one")
    unknown = annotations.keys() - images.keys()
    if unknown:
        raise UserError(
            f"{file}: {len(unknown)} annotations refer to images missing from `images`, e.g. {min(unknown)}"
        )
    order = sorted(annotations)
    if not order:
        raise UserError(f"{file} holds no annotations")
    segments: list[Mapping[str, Any]] = []
    first, problems = [0], []
    for image_id in order:
        infos = annotations[image_id]["segments_info"]
        problems += _segment_problems(annotations[image_id], infos, number)
        segments += infos
        first.append(len(segments))
    if problems:
        more = f" (and {len(problems) - 1} more invalid annotations)" if len(problems) > 1 else ""
        raise UserError(f"{file}: {problems[0]}{more}")
    entries = [images[image_id] for image_id in order]
    return {
        "image_ids": np.array(order, np.int64 if isinstance(order[0], int) else np.str_),
        "images": np.array([inner_name(entry["file_name"], file) for entry in entries], np.str_),
        "pngs": np.array([inner_name(annotations[image_id]["file_name"], file) for image_id in order], np.str_),
        "first": np.array(first, np.int64),
        "ids": np.array([info["id"] for info in segments], np.int64),
        "classes": np.array([number[int(info["category_id"])] for info in segments], np.int64),
        "areas": np.array([-1 if info.get("area") is None else info["area"] for info in segments], np.int64),
        "crowd": np.array([flag(file, info, "iscrowd") for info in segments], np.bool_),
        "is_thing": np.array([flag(file, category, "isthing") for category in categories], np.bool_),
        "without_annotation": np.array(len(images) - len(order)),
        **category_tables(categories),
    }


def category_numbers(file: Path, categories: Sequence[Mapping[str, Any]]) -> dict[int, int]:
    """Category id -> class 1..C, in the file's order. Raises UserError if there are none or an id is repeated."""
    number = {int(category["id"]): i + 1 for i, category in enumerate(categories)}
    if len(number) != len(categories) or not categories:
        raise UserError(f"{file}: its categories are empty or repeat an id")
    return number


def category_tables(categories: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """`category_ids`, `category_names` and `colors` of an `Index`."""
    colors = [category.get("color") for category in categories]
    valid = all(
        isinstance(c, list) and len(c) == 3 and all(type(v) is int and 0 <= v <= 255 for v in c) for c in colors
    )
    return {
        "category_ids": np.array([category["id"] for category in categories], np.int64),
        "category_names": np.array(_unique_names(categories), np.str_),
        "colors": np.array(colors if valid else [], np.uint8).reshape(-1, 3),
    }


def flag(file: Path, entry: Mapping[str, Any], key: str) -> bool:
    """A field of value 0, 1, true or false; `iscrowd` defaults to 0. Raises UserError for any other value."""
    value = entry.get(key, 0) if key == "iscrowd" else entry[key]
    if value not in (0, 1):
        raise UserError(f"{file}: `{key}` is {value!r}, expected 0 or 1 (entry of id {entry['id']})")
    return bool(value)


def _unique_names(categories: Sequence[Mapping[str, Any]]) -> list[str]:
    """The category names, as short printable text in one line, because pictures, pages and settings show them.

    Results are reported by name, so categories with the same name get their id appended.
    """
    names = [" ".join(str(category.get("name", category["id"])).split())[:LONGEST_NAME] for category in categories]
    names = ["".join(c if c.isprintable() else "?" for c in name) for name in names]
    return [
        f"{name} ({category['id']})" if names.count(name) > 1 else name
        for name, category in zip(names, categories, strict=True)
    ]


def _segment_problems(
    annotation: Mapping[str, Any], infos: Sequence[Mapping[str, Any]], number: Mapping[int, int]
) -> Iterator[str]:
    """Yields the first problem of one annotation, if any."""
    ids = [int(info["id"]) for info in infos]
    name = annotation["file_name"]
    unknown = [info["category_id"] for info in infos if int(info["category_id"]) not in number]
    if len(set(ids)) != len(ids):
        repeated = next(i for i in ids if ids.count(i) > 1)
        yield f"segment id {repeated} appears twice in the annotation of {name}; give each segment its own id"
    elif ids and not 0 < min(ids) <= max(ids) < 1 << 24:
        wrong = min(ids) if min(ids) < 1 else max(ids)
        yield f"{name} has segment id {wrong}, outside of 1..16777215, which a PNG cannot store; renumber the segments"
    elif unknown:
        yield f"{name} has a segment of category {unknown[0]}, which `categories` does not list"
