"""A panoptic annotation file as a few flat arrays, checked once; large files are parsed once and kept in the cache."""

from __future__ import annotations

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

#: Files below this size are parsed each time.
CACHE_FROM = 20_000_000


@dataclass(frozen=True)
class Index:
    """One annotation file. N images in the order of their ids, M segments, C categories in the file's order.

    Attributes:
        file: the JSON.
        image_ids: (N,) int64, or str where the file has names as ids (Cityscapes).
        images, pngs: (N,) str, file names of photo and id map.
        first: (N + 1,) int64; the segments of image i are first[i]..first[i + 1] - 1.
        ids: (M,) int64 24-bit ids of the segments in the PNG.
        classes: (M,) int64, 1..C in the order of the file's categories.
        areas: (M,) int64 as the JSON says, -1 where it says nothing. crowd: (M,) bool.
        category_ids: (C,) int64. category_names: (C,) str. is_thing: (C,) bool.
        without_annotation: images of the file that no annotation is about; they are left out.
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
    without_annotation: int

    @property
    def categories(self) -> tuple[tuple[int, str, bool], ...]:
        """(id, name, is a thing) of each category; class c of the labels is entry c - 1."""
        rows = zip(self.category_ids, self.category_names, self.is_thing, strict=True)
        return tuple((int(i), str(name), bool(thing)) for i, name, thing in rows)


def read_index(file: Path) -> Index:
    """The index of a panoptic JSON. Raises UserError for a file that is none, or contradicts itself."""
    try:
        stat = file.stat()
    except OSError:
        raise UserError(f"{file}: no such annotation file") from None
    return _read(file, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=4)
def _read(file: Path, mtime: int, size: int) -> Index:
    if size < CACHE_FROM:
        arrays = _parse(file)
    else:
        # The version tells files apart that were written before names were checked.
        key = {"file": str(file.resolve()), "mtime": mtime, "size": size, "version": 2}
        arrays = cached_arrays("panoptic_index", key, lambda: _parse(file))
    return Index(file=file, **{**arrays, "without_annotation": int(arrays["without_annotation"])})


def _parse(file: Path) -> dict[str, np.ndarray]:
    try:
        tree = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is no valid JSON ({error}); it is truncated or broken, replace it") from error
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror})") from error
    keys = ("images", "annotations", "categories")
    if not isinstance(tree, dict) or any(not isinstance(tree.get(key), list) for key in keys):
        raise UserError(f"{file} is no panoptic annotation file: it needs lists {', '.join(keys)}")
    try:
        return _tables(file, tree)
    except UserError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise UserError(
            f"{file}: an entry lacks or garbles a field of the COCO panoptic format ({error!r}); "
            "images need id, file_name; annotations image_id, file_name, segments_info; segments id, category_id"
        ) from error


def _tables(file: Path, tree: Mapping[str, Any]) -> dict[str, np.ndarray]:
    categories = tree["categories"]
    number = {int(category["id"]): i + 1 for i, category in enumerate(categories)}
    if len(number) != len(categories) or not categories:
        raise UserError(f"{file}: its categories are empty or one id stands there twice")
    images = {image["id"]: image for image in tree["images"]}
    annotations = {annotation["image_id"]: annotation for annotation in tree["annotations"]}
    for name, table, rows in (("image id", images, "images"), ("image_id", annotations, "annotations")):
        if len(table) != len(tree[rows]):
            raise UserError(f"{file}: {len(tree[rows]) - len(table)} entries of `{rows}` repeat an {name}; remove them")
        for twice, times in Counter(entry["file_name"] for entry in table.values()).most_common(1):
            if times > 1:
                raise UserError(f"{file}: {times} entries of `{rows}` are of the file {twice}; remove all but one")
    strangers = annotations.keys() - images.keys()
    if strangers:
        raise UserError(
            f"{file}: {len(strangers)} annotations are of images that `images` lacks, e.g. {min(strangers)}"
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
        more = f" (and {len(problems) - 1} more annotations with such faults)" if len(problems) > 1 else ""
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
        "crowd": np.array([_flag(file, info, "iscrowd") for info in segments], np.bool_),
        "category_ids": np.array([category["id"] for category in categories], np.int64),
        "category_names": np.array(_unique_names(categories), np.str_),
        "is_thing": np.array([_flag(file, category, "isthing") for category in categories], np.bool_),
        "without_annotation": np.array(len(images) - len(order)),
    }


def _flag(file: Path, entry: Mapping[str, Any], key: str) -> bool:
    """0 or 1, also as a truth value; a segment need not say whether it is a crowd."""
    value = entry.get(key, 0) if key == "iscrowd" else entry[key]
    if value not in (0, 1):
        raise UserError(f"{file}: `{key}` is {value!r}, expected 0 or 1 (entry of id {entry['id']})")
    return bool(value)


def _unique_names(categories: Sequence[Mapping[str, Any]]) -> list[str]:
    """Figures are reported by name, so categories that share one carry their id too."""
    names = [str(category.get("name", category["id"])) for category in categories]
    return [
        f"{name} ({category['id']})" if names.count(name) > 1 else name
        for name, category in zip(names, categories, strict=True)
    ]


def _segment_problems(
    annotation: Mapping[str, Any], infos: Sequence[Mapping[str, Any]], number: Mapping[int, int]
) -> Iterator[str]:
    """The first thing that is wrong with one annotation, if anything."""
    ids = [int(info["id"]) for info in infos]
    name = annotation["file_name"]
    strangers = [info["category_id"] for info in infos if int(info["category_id"]) not in number]
    if len(set(ids)) != len(ids):
        twice = next(i for i in ids if ids.count(i) > 1)
        yield f"segment id {twice} stands twice in the annotation of {name}; give each its own id"
    elif ids and not 0 < min(ids) <= max(ids) < 1 << 24:
        wrong = min(ids) if min(ids) < 1 else max(ids)
        yield f"{name} has segment id {wrong}, outside of 1..16777215, which its PNG cannot hold; renumber the segments"
    elif strangers:
        yield f"{name} has a segment of category {strangers[0]}, which `categories` does not list"
