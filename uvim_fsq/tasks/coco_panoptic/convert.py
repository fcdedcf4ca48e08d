"""Converts the original labels of Cityscapes and ADE20K to the COCO panoptic format, under the names that their readers
expect (`layouts.py`).

Cityscapes: gtFine/{train,val}/CITY/*_gtFine_instanceIds.png, to what cityscapesScripts' createPanopticImgs writes.
ADE20K: the MIT scene parsing challenge's annotations/ and annotations_instance/{training,validation}/*.png and
objectInfo150.txt, to what the common recipe of MaskFormer (arXiv 2107.06278) writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from uvim_fsq.data.images import decode_png, write_png
from uvim_fsq.data.roots import find_data_root
from uvim_fsq.errors import UserError
from uvim_fsq.files import inside, write_json, writing
from uvim_fsq.tasks.coco_panoptic.layouts import raw_labels
from uvim_fsq.tasks.coco_panoptic.segments import ids_to_rgb

Progress = Callable[[int, int], None]
#: id, name, supercategory, is a thing, color of the evaluated classes (Cordts et al., arXiv 1604.01685).
CITYSCAPES = (
    (7, "road", "flat", 0, (128, 64, 128)),
    (8, "sidewalk", "flat", 0, (244, 35, 232)),
    (11, "building", "construction", 0, (70, 70, 70)),
    (12, "wall", "construction", 0, (102, 102, 156)),
    (13, "fence", "construction", 0, (190, 153, 153)),
    (17, "pole", "object", 0, (153, 153, 153)),
    (19, "traffic light", "object", 0, (250, 170, 30)),
    (20, "traffic sign", "object", 0, (220, 220, 0)),
    (21, "vegetation", "nature", 0, (107, 142, 35)),
    (22, "terrain", "nature", 0, (152, 251, 152)),
    (23, "sky", "sky", 0, (70, 130, 180)),
    (24, "person", "human", 1, (220, 20, 60)),
    (25, "rider", "human", 1, (255, 0, 0)),
    (26, "car", "vehicle", 1, (0, 0, 142)),
    (27, "truck", "vehicle", 1, (0, 0, 70)),
    (28, "bus", "vehicle", 1, (0, 60, 100)),
    (31, "train", "vehicle", 1, (0, 80, 100)),
    (32, "motorcycle", "vehicle", 1, (0, 0, 230)),
    (33, "bicycle", "vehicle", 1, (119, 11, 32)),
)
#: The classes of ADE20K's 1..150 without instances: classes 1..100 of its instance challenge are the others, in order.
ADE20K_STUFF = (
    *(1, 2, 3, 4, 5, 6, 7, 10, 12, 14, 17, 18, 22, 26, 27, 29, 30, 35, 41, 47, 49, 52, 53, 55, 60, 61, 62, 64, 69),
    *(78, 80, 85, 92, 95, 97, 100, 101, 102, 106, 107, 110, 114, 115, 118, 123, 129, 132, 141, 142, 146),
)
_ADE20K_FOLDERS = {"train": "training", "val": "validation"}


@dataclass(frozen=True)
class _Converted:
    """One image: its entries of the JSON's `images` and `annotations`, and its id map (H, W) int32."""

    image: dict[str, Any]
    annotation: dict[str, Any]
    ids: np.ndarray


@dataclass(frozen=True)
class _Plan:
    """One split: the JSON file to write, the original labels, and how one of them is converted."""

    json: Path
    files: Sequence[Path]
    categories: list[dict[str, Any]]
    convert: Callable[[Path], _Converted]


def convert(root: str, out: Path | None, progress: Progress) -> str:
    """Writes a JSON and a folder of id PNGs for the splits train and val, in `root` or in the folder `out`.

    A split whose JSON exists is left alone. The JSON is written last, so that a split that was interrupted is not
    taken for a complete one, and is converted again. Returns a one-line summary.

    Raises UserError if there is nothing to convert, or a file is missing or damaged.
    """
    place = find_data_root(root)
    kind = raw_labels(place)
    if not kind:
        raise UserError(
            f"{place} holds no labels to convert: neither Cityscapes' gtFine/*/*/*_gtFine_instanceIds.png nor ADE20K's "
            "annotations_instance/training/*.png; COCO's files are read as they are"
        )
    plans = (_cityscapes if kind == "Cityscapes" else _ade20k)(place, out or place)
    done: list[str] = []
    for split, plan in plans.items():
        if plan.json.exists():
            done.append(f"{split} was there already")
        elif plan.files:
            _write_split(plan, progress)
            done.append(f"{len(plan.files)} {split} images")
    return f"{kind}: {', '.join(done)}; in {next(iter(plans.values())).json.parent}"


def _write_split(plan: _Plan, progress: Progress) -> None:
    folder = plan.json.with_suffix("")
    partial = folder.with_name(f"{folder.name}.partial")
    if folder.exists():
        raise UserError(f"{folder} exists, but {plan.json.name} does not; move or delete the folder")
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for done, file in enumerate(plan.files):
        progress(done, len(plan.files))
        converted = plan.convert(file)
        images.append(converted.image)
        annotations.append(converted.annotation)
        target = partial / converted.annotation["file_name"]
        write_png(inside(plan.json.parent, target), ids_to_rgb(converted.ids))
    with writing(folder):
        partial.rename(folder)
    write_json(plan.json, {"images": images, "annotations": annotations, "categories": plan.categories}, indent=None)
    progress(len(plan.files), len(plan.files))


def _converted(image_id: str, photo: str, png: str, ids: np.ndarray, segments: Iterable[tuple[int, int, bool]]) -> Any:
    """`segments`: (id in `ids`, category id, crowd); those without pixels are left out."""
    infos: list[dict[str, Any]] = []
    for number, category, crowd in segments:
        rows, columns = np.nonzero(ids == number)
        if not len(rows):
            continue
        left, top = int(columns.min()), int(rows.min())
        box = [left, top, int(columns.max()) - left + 1, int(rows.max()) - top + 1]
        infos.append({"id": number, "category_id": category, "area": len(rows), "bbox": box, "iscrowd": int(crowd)})
    image = {"id": image_id, "file_name": photo, "height": ids.shape[0], "width": ids.shape[1]}
    return _Converted(image, {"image_id": image_id, "file_name": png, "segments_info": infos}, ids)


def _read_label(file: Path, dtype: type, channels: int) -> np.ndarray:
    """(H, W) or, as RGB, (H, W, 3). Raises UserError if the PNG is missing, damaged or of another kind."""
    try:
        pixels = decode_png(file.read_bytes(), file)
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); download it again") from error
    if pixels is None or pixels.dtype != dtype or pixels.ndim != (2 if channels == 1 else 3):
        bits = np.dtype(dtype).itemsize * 8
        raise UserError(f"{file} is not a PNG of {channels} x {bits} bits, as its data set has; download it again")
    return pixels if channels == 1 else pixels[..., 2::-1]


# ---------------------------------------------------------------- Cityscapes


def _cityscapes(root: Path, out: Path) -> dict[str, _Plan]:
    categories = [
        {"id": number, "name": name, "supercategory": parent, "isthing": thing, "color": list(color)}
        for number, name, parent, thing, color in CITYSCAPES
    ]
    return {
        split: _Plan(
            out / "gtFine" / f"cityscapes_panoptic_{split}.json",
            sorted((root / "gtFine" / split).glob("*/*_gtFine_instanceIds.png")),
            categories,
            _convert_cityscapes,
        )
        for split in ("train", "val")
    }


def _convert_cityscapes(file: Path) -> _Converted:
    """Pixels of instanceIds are 1000 * class + number, or the class alone: of stuff, and of groups of things."""
    values = _read_label(file, np.uint16, 1).astype(np.int32)
    is_thing = {number: bool(thing) for number, _, _, thing, _ in CITYSCAPES}
    segments: list[tuple[int, int, bool]] = []
    for value in map(int, np.unique(values)):
        category = value if value < 1000 else value // 1000
        if category in is_thing:
            segments.append((value, category, is_thing[category] and value < 1000))
    ids = np.where(np.isin(values, [number for number, _, _ in segments]), values, 0).astype(np.int32)
    image_id = file.name.removesuffix("_gtFine_instanceIds.png")
    png = f"{image_id}_gtFine_panoptic.png"
    return _converted(image_id, f"{image_id}_gtFine_leftImg8bit.png", png, ids, segments)


# ---------------------------------------------------------------- ADE20K


def _ade20k(root: Path, out: Path) -> dict[str, _Plan]:
    names = read_object_info(root / "objectInfo150.txt")
    # As in the common JSON files, the ids of the categories are 0..149.
    categories = [{"id": i, "name": name, "isthing": int(i + 1 not in ADE20K_STUFF)} for i, name in enumerate(names)]
    return {
        split: _Plan(
            out / f"ade20k_panoptic_{split}.json",
            sorted((root / "annotations_instance" / folder).glob("*.png")),
            categories,
            _convert_ade20k,
        )
        for split, folder in _ADE20K_FOLDERS.items()
    }


def read_object_info(file: Path) -> list[str]:
    """The names of the 150 classes in objectInfo150.txt: a heading, and lines of an index, numbers and, last, a name.

    Raises UserError if it is missing or has other lines.
    """
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()[1:]
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); it is part of ADEChallengeData2016.zip") from error
    rows = [[field.strip() for field in line.split("\t")] for line in lines if line.strip()]
    if [row[0] for row in rows] != [str(i) for i in range(1, 151)] or any(len(row) < 2 for row in rows):
        raise UserError(f"{file} does not list the classes 1 to 150; use the file of ADEChallengeData2016.zip")
    return [row[-1] for row in rows]


def _convert_ade20k(file: Path) -> _Converted:
    """Stuff comes from the semantic map; the instances, red: class 1..100, green: number, lie over it.

    Things of the semantic map that no instance covers become void.
    """
    semantic_file = file.parent.parent.parent / "annotations" / file.parent.name / file.name
    classes, instances = _read_label(semantic_file, np.uint8, 1), _read_label(file, np.uint8, 3)
    if classes.shape != instances.shape[:2]:
        raise UserError(f"{semantic_file} and {file} have different sizes; download them again")
    things = [c for c in range(1, 151) if c not in ADE20K_STUFF]
    kind, number = instances[..., 0].astype(np.int32), instances[..., 1].astype(np.int32)
    if classes.max(initial=0) > 150 or kind[number > 0].max(initial=0) > 100 or kind[number > 0].min(initial=1) < 1:
        raise UserError(f"{file} or {semantic_file} has a class out of range; download them again")
    # Stuff is 1..150, an instance 1000 * its class + its number.
    key = np.where(np.isin(classes, ADE20K_STUFF), classes, 0).astype(np.int32)
    key = np.where(number > 0, 1000 * np.array([0, *things], np.int32)[kind] + number, key)
    keys, ids = np.unique(key, return_inverse=True)
    first = int(keys[0] > 0)  # the segments are 1..K, also where no pixel is void
    ids = (ids.reshape(key.shape) + first).astype(np.int32)
    segments = [
        (i, (value if value < 1000 else value // 1000) - 1, False)
        for i, value in enumerate(map(int, keys), start=first)
        if value
    ]
    return _converted(file.stem, f"{file.stem}.jpg", file.name, ids, segments)
