"""Reads folders of photos and class PNGs, in the layouts in which data sets come.

A Sample's map `classes`, (H, W) int32, numbers the classes 0..C - 1 in the order of the settings; -1 is no label.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from uvim_fsq.data.decoded import decoded
from uvim_fsq.data.folders import IMAGE_SUFFIXES, and_list, files_by_stem, has_split_folders, split_folder
from uvim_fsq.data.images import open_picture, read_image
from uvim_fsq.data.roots import find_data_root
from uvim_fsq.data.sample import Sample
from uvim_fsq.data.saved_datasets import SavedRows, is_saved_dataset, open_rows, read_photo
from uvim_fsq.data.splits import SPLITS, split_rows
from uvim_fsq.errors import UserError
from uvim_fsq.tasks.semantic_segmentation.classes import check_classes
from uvim_fsq.tasks.semantic_segmentation.config import SemanticSegmentationConfig

#: Folders of photos and of class PNGs that are found without settings; {split} is a name of the split, see `PARTS`.
LAYOUTS = (
    ("{split}/images", "{split}/labels"),
    ("{split}/images", "{split}/masks"),
    ("images/{split}", "labels/{split}"),
    ("images/{split}", "annotations/{split}"),
    ("img_dir/{split}", "ann_dir/{split}"),
    ("leftImg8bit/{split}", "gtFine/{split}"),
    ("{split}", "{split}annot"),
    ("{split}", "{split}_labels"),
    ("images", "labels"),
    ("images", "masks"),
    ("images", "annotations"),
)
#: Names of the two parts in `LAYOUTS`; those of ADE20K are the second ones.
PARTS = {"train": ("train", "training"), "val": ("val", "validation")}
#: Entry of a pixel value that is neither a class nor ignored, in `ClassTable.indices`.
UNKNOWN = -2


@dataclass(frozen=True)
class ClassTable:
    """Translates pixels of class PNGs to class indices.

    Attributes:
        names: (C,) names of the classes that are learned.
        values: (C,) their pixel values.
        colors: (C, 3) uint8.
        indices: (65536,) int16: pixel value -> class index, -1 for no label, `UNKNOWN` for others.
        rgb: color as R + 256 G + 65536 B -> the same, for PNGs that show the colors; the classes of the class file that
            are ignored by name are among them.
    """

    names: tuple[str, ...]
    values: np.ndarray
    colors: np.ndarray
    indices: np.ndarray
    rgb: dict[int, int]

    @classmethod
    def of(cls, config: SemanticSegmentationConfig) -> ClassTable:
        """The table of resolved settings. Raises UserError for wrong classes, or if fewer than two are left."""
        classes = check_classes(config.classes, "task.classes")
        rows = [(value, name, bytes.fromhex(color[1:])) for value, name, color in classes]
        unknown = sorted(set(config.ignore_names) - {name for _, name, _ in rows})
        if unknown:
            raise UserError(f"task.ignore_names: no class is named {and_list(unknown)}")
        ignored = [row for row in rows if row[1] in config.ignore_names or row[0] in config.ignore]
        kept = [row for row in rows if row not in ignored]
        if len(kept) < 2:
            raise UserError(f"task.classes: {len(kept)} classes are left without the ignored ones; 2 are needed")
        indices = np.full(1 << 16, UNKNOWN, np.int16)
        indices[[value for value in config.ignore if 0 <= value < len(indices)]] = -1
        indices[[value for value, _, _ in ignored]] = -1
        values = np.array([value for value, _, _ in kept])
        indices[values] = np.arange(len(kept))
        codes = {int.from_bytes(color, "little"): -1 for _, _, color in ignored}
        codes |= {int.from_bytes(color, "little"): i for i, (_, _, color) in enumerate(kept)}
        colors = np.array([list(color) for _, _, color in kept], np.uint8)
        return cls(tuple(name for _, name, _ in kept), values, colors, indices, codes)

    def translate(self, pixels: np.ndarray, name: str | Path) -> np.ndarray:
        """(H, W) pixel values, or (H, W, 3) colors -> (H, W) int32 class indices, -1 for no label.

        Raises UserError, naming `name`, for a value or color that is neither a class nor ignored.
        """
        if pixels.ndim == 2:
            found = self.indices.take(pixels, mode="clip").astype(np.int32)
            found[(pixels < 0) | (pixels >= len(self.indices))] = UNKNOWN
        else:
            found = self._of_colors(pixels, name)
        unknown = found == UNKNOWN
        if unknown.any():
            values = sorted({_describe(pixel) for pixel in np.unique(pixels[unknown], axis=0)[:100]})
            raise UserError(
                f"{name}: {int(unknown.sum())} pixels are {and_list(values)}, which is no class; add it to the class "
                "file, or to task.ignore (a value) or task.ignore_names (a class) if it means no label"
            )
        return found

    def _of_colors(self, pixels: np.ndarray, name: str | Path) -> np.ndarray:
        if len(self.rgb) < len(self.values):
            raise UserError(f"{name} shows classes by color, but two classes have the same; correct the class file")
        codes = pixels.astype(np.int32) @ np.array([1, 1 << 8, 1 << 16], np.int32)
        known = np.array(sorted(self.rgb), np.int32)
        place = np.minimum(np.searchsorted(known, codes), len(known) - 1)
        indices = np.array([self.rgb[int(code)] for code in known], np.int32)
        return np.where(known[place] == codes, indices[place], np.int32(UNKNOWN))


def _describe(pixel: np.ndarray) -> str:
    return str(int(pixel)) if pixel.ndim == 0 else f"({', '.join(str(int(part)) for part in pixel)})"


def read_label_map(source: str | Path | bytes, table: ClassTable, name: str | Path) -> np.ndarray:
    """A class PNG, or its content -> (H, W) int32 class indices, -1 for no label.

    Gray and palette pictures hold pixel values, RGB ones colors. Raises UserError naming the file.
    """
    try:
        with open_picture(source) as image:
            if image.format == "JPEG":
                raise UserError(f"{name} is a JPEG, which changes the values of pixels; class maps need PNG")
            if image.mode not in ("1", "L", "P", "I;16", "I;16B", "I", "RGB", "RGBA"):
                raise UserError(f"{name} has pixels of kind {image.mode}; class maps are gray, palette or RGB pictures")
            pixels = np.asarray(image.convert("RGB") if image.mode == "RGBA" else image)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{name}: no such file; each photo needs its class PNG") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{name} cannot be read as a class PNG ({error}); replace or remove it") from error
    return table.translate(pixels, name)


@dataclass
class SegmentationSource:
    """Pairs of photo and class PNG: (id, photo, PNG)."""

    pairs: list[tuple[str, Path, Path]]
    table: ClassTable
    info: dict[str, Any]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Sample:
        name, photo, labels = self.pairs[index]
        how = ["classes", self._translation]
        classes = decoded(labels, np.int32, how, lambda: read_label_map(labels, self.table, labels))
        return make_sample(name, read_image(photo), classes, labels)

    @functools.cached_property
    def _translation(self) -> str:
        """Identifies what `ClassTable.translate` makes of pixels."""
        return hashlib.sha256(self.table.indices.tobytes() + repr(sorted(self.table.rgb.items())).encode()).hexdigest()


@dataclass
class SavedSource:
    """Rows of a data set saved by the library `datasets`: a photo and a class map, a picture or an array."""

    rows: SavedRows
    table: ClassTable
    info: dict[str, Any]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        name, (photo, stored) = f"{self.rows.root}, {self.rows.name(index)}", self.rows[index].values()
        if isinstance(stored, bytes):
            classes = read_label_map(stored, self.table, name)
        else:
            try:
                values = np.asarray(stored)
            except ValueError as error:
                raise UserError(f"{name}: no class map, its rows have different lengths; remove it") from error
            if values.ndim != 2 or values.dtype.kind not in "iub":
                raise UserError(f"{name}: the class map is {values.dtype} {values.shape}, expected integers (H, W)")
            classes = self.table.translate(values, name)
        return make_sample(self.rows.name(index), read_photo(photo, name), classes, name)


def make_sample(name: str, image: np.ndarray, classes: np.ndarray, labels: str | Path) -> Sample:
    """A sample, if image and class map have the same size; else UserError, naming the file `labels`."""
    if image.shape[:2] != classes.shape:
        raise UserError(f"{labels} is {classes.shape}, but its photo {image.shape[:2]}; fix or remove them")
    return Sample(name, image, {"classes": classes})


def open_source(root: str, split: str, config: SemanticSegmentationConfig) -> SegmentationSource | SavedSource:
    """The adapter for the data under `root`.

    Splits: train, val, holdout (a fixed part of train, for tuning) and train_minus_holdout. Without parts of their own,
    every tenth photo belongs to val.

    Raises UserError for an unknown split, and if no data are found or they are incomplete.
    """
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    if is_saved_dataset(find_data_root(root)):
        return _open_saved(find_data_root(root), split, config)
    place, part = find_data_root(root), "val" if split == "val" else "train"
    photos, labels, layout = find_folders(place, part, config)
    listed = place / config.list_file.replace("{split}", part) if config.list_file else None
    pairs = _pairs(photos, labels, config, listed)
    if "{split}" not in layout + config.list_file:
        pairs = pairs[::10] if part == "val" else [pair for i, pair in enumerate(pairs) if i % 10]
    pairs = [pairs[row] for row in split_rows(split, [name for name, *_ in pairs])]
    table = ClassTable.of(config)
    info = {"layout": layout, "split": split, "count": len(pairs), "classes": len(table.names), "root": place.name}
    return SegmentationSource(pairs, table, info)


def _open_saved(root: Path, split: str, config: SemanticSegmentationConfig) -> SavedSource:
    rows, table = open_rows(root, split, (config.image_column, config.label_column)), ClassTable.of(config)
    info = {"layout": "datasets", "split": split, "count": len(rows), "classes": len(table.names), "root": root.name}
    return SavedSource(rows, table, info)


def find_folders(place: Path, part: str, config: SemanticSegmentationConfig) -> tuple[Path, Path, str]:
    """The folders of photos and of class PNGs of `part` ("train" or "val"), and their pattern for descriptions.

    Raises UserError listing what was looked for.
    """
    if bool(config.image_dir) != bool(config.label_dir):
        missing = "task.label_dir" if config.image_dir else "task.image_dir"
        raise UserError(f"{missing} is missing; set both folders, task.image_dir and task.label_dir, or neither")
    if config.image_dir:
        found = [place / folder.replace("{split}", part) for folder in (config.image_dir, config.label_dir)]
        for key, folder in zip(("image_dir", "label_dir"), found, strict=True):
            if not folder.is_dir():
                raise UserError(f"task.{key}={getattr(config, key)}: {folder} is not a folder")
        return found[0], found[1], f"{config.image_dir} + {config.label_dir}"
    for images, labels in LAYOUTS:
        for name in PARTS[part]:
            photos, maps = (place / folder.replace("{split}", name) for folder in (images, labels))
            if photos.is_dir() and maps.is_dir():
                return photos, maps, f"{images} + {labels}"
    if has_split_folders(place):
        split_folder(place, part)
    there = and_list([f"{path.name}/" for path in sorted(place.iterdir()) if path.is_dir()] if place.is_dir() else [])
    known = ", ".join(" + ".join(pair) for pair in LAYOUTS[:4])
    raise UserError(
        f"{place}: no photos with class PNGs of {part} found. Looked for {known} and others, found "
        f"{there or 'no folder'}; set task.image_dir and task.label_dir, see datasets/README.md"
    )


def _pairs(
    photos: Path, labels: Path, config: SemanticSegmentationConfig, listed: Path | None
) -> list[tuple[str, Path, Path]]:
    """(name without extension, photo, PNG) of the photos in the file `listed`, or of all, sorted by name.

    Raises UserError if one has no class PNG.
    """

    def is_photo(path: Path) -> bool:
        # Photos and class PNGs may be in the same folder.
        is_label = photos == labels and bool(config.label_suffix) and path.stem.endswith(config.label_suffix)
        return path.suffix.lower() in IMAGE_SUFFIXES and not is_label

    images = files_by_stem(photos, is_photo, config.image_suffix)
    maps = files_by_stem(labels, lambda path: path.suffix.lower() in IMAGE_SUFFIXES, config.label_suffix)
    if not images:
        suffix = f" whose name ends with {config.image_suffix}" if config.image_suffix else ""
        raise UserError(f"{photos} holds no photos{suffix}")
    names = list(images) if listed is None else _listed(listed, images)
    missing = [name for name in names if name not in maps]
    if missing:
        name = f"{missing[0]}{config.label_suffix}.png"
        raise UserError(f"{labels}: {len(missing)} photos have no class PNG, the first would be {name}")
    return [(name, images[name], maps[name]) for name in names]


def _listed(file: Path, known: Container[str]) -> list[str]:
    """Those of the names `known` that a file lists, one in each line, with or without extension.

    Raises UserError for a missing file and for a photo that does not exist.
    """
    try:
        lines = [line.strip() for line in os.fsdecode(file.read_bytes()).splitlines() if line.strip()]
    except OSError as error:
        raise UserError(f"task.list_file: {file} cannot be read ({error.strerror})") from error
    found: list[str] = []
    for line in lines:
        # A second column, such as the path of the class map, is skipped.
        names = [line, line.split()[0]]
        names += [str(Path(name).with_suffix("")) for name in names if Path(name).suffix.lower() in IMAGE_SUFFIXES]
        name = next((name for name in names if name in known), None)
        if name is None:
            raise UserError(f"{file} lists {line[:200]!r}, but there is no photo of that name")
        found.append(name)
    if not found:
        raise UserError(f"{file} lists no photos")
    return found
