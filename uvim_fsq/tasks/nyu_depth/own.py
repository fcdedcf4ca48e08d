"""Finds the pairs of image and depth map in your own folders, and in data sets with the same structure.

- images/NAME.jpg and depth/NAME.png;
- the same in the folder of each scene (ScanNet: scene0000_00/color/0.jpg and depth/0.png);
- NAME.png and NAME_depth.npy next to each other, in any folders (DIODE).

A depth map NAME.npy may have a mask of its valid pixels, NAME_mask.npy or .png, next to it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from uvim_fsq.data.folders import IMAGE_SUFFIXES, and_list, files_by_stem, has_split_folders
from uvim_fsq.errors import UserError
from uvim_fsq.tasks.nyu_depth.config import NYUDepthConfig

DEPTH, MASK = "_depth", "_mask"
DEPTH_SUFFIXES = {".png", ".npy", ".h5", ".hdf5", ".tif", ".tiff"}


@dataclass(frozen=True)
class OwnPairs:
    """Pairs of files, sorted by id.

    Attributes:
        pairs: (id, image, depth map) of each; the id is the path without extension.
        masks: id -> mask of the valid pixels, where there is one.
        scenes: whether images of a folder belong together, so that a split must not divide them.
    """

    pairs: list[tuple[str, Path, Path]]
    masks: dict[str, Path]
    scenes: bool

    def every_tenth(self, rows: list[int]) -> set[int]:
        """Every tenth of the rows, or all rows of every tenth scene if there is more than one."""
        folders = [os.path.dirname(self.pairs[row][0]) for row in rows]
        names = sorted(set(folders))
        if not self.scenes or len(names) == 1:
            return set(rows[::10])
        chosen = set(names[::10])
        return {row for row, folder in zip(rows, folders, strict=True) if folder in chosen}


def find_own(place: Path, config: NYUDepthConfig) -> bool:
    """Whether `place` has scenes with images and depth maps, or images and depth maps next to each other."""
    bases = [place / "train", place / "val"] if has_split_folders(place) else [place]
    return any(find_scenes(base, config) or _has_neighbors(base) for base in bases)


def find_scenes(base: Path, config: NYUDepthConfig, levels: int = 2) -> list[Path]:
    """The folders, up to `levels` below `base`, that hold a folder of images and one of depth maps."""
    patterns = ("*", "*/*")[:levels]
    found = (path.parent for pattern in patterns for path in base.glob(f"{pattern}/{config.image_dir}"))
    return sorted(folder for folder in found if (folder / config.depth_dir).is_dir())


def _has_neighbors(base: Path) -> bool:
    return any(path.suffix.lower() in DEPTH_SUFFIXES for path in base.rglob(f"*{DEPTH}.*"))


def own_pairs(base: Path, config: NYUDepthConfig) -> OwnPairs:
    """The pairs below `base`. Raises UserError if a folder or a depth map is missing."""
    images, depths = base / config.image_dir, base / config.depth_dir
    if not (images.is_dir() and depths.is_dir()):
        scenes = [] if images.is_dir() or depths.is_dir() else find_scenes(base, config)
        if scenes:
            return _of_scenes(base, scenes, config)
        if not images.is_dir() and not depths.is_dir() and _has_neighbors(base):
            return _neighbors(base)
    for folder, key in ((images, "image_dir"), (depths, "depth_dir")):
        if not folder.is_dir():
            there = and_list(sorted(f"{path.name}/" for path in base.iterdir() if path.is_dir()))
            raise UserError(f"{base} holds {there or 'no folder'}, but no {folder.name}/; set task.{key} to its name")
    pairs, masks = _matched(images, depths)
    if not pairs:
        raise UserError(f"{images} holds no images")
    return OwnPairs(pairs, masks, False)


def _matched(images: Path, depths: Path, prefix: str = "") -> tuple[list[tuple[str, Path, Path]], dict[str, Path]]:
    photos = files_by_stem(images, lambda path: path.suffix.lower() in IMAGE_SUFFIXES)
    maps = files_by_stem(depths, lambda path: path.is_file())
    missing = sorted(photos.keys() - maps.keys())
    if missing:
        raise UserError(f"{depths}: {len(missing)} images have no depth map, the first is {missing[0]}")
    masks = {prefix + name: maps[name + MASK] for name in photos if name + MASK in maps}
    return [(prefix + name, path, maps[name]) for name, path in photos.items()], masks


def _of_scenes(base: Path, scenes: list[Path], config: NYUDepthConfig) -> OwnPairs:
    pairs: list[tuple[str, Path, Path]] = []
    masks: dict[str, Path] = {}
    for scene in scenes:
        found, own_masks = _matched(
            scene / config.image_dir, scene / config.depth_dir, f"{scene.relative_to(base).as_posix()}/"
        )
        pairs += found
        masks |= own_masks
    if not pairs:
        raise UserError(f"{base}: the folders {config.image_dir}/ of {len(scenes)} scenes hold no images")
    return OwnPairs(pairs, masks, True)


def _neighbors(base: Path) -> OwnPairs:
    def is_image(path: Path) -> bool:
        return path.suffix.lower() in IMAGE_SUFFIXES and not path.stem.endswith((DEPTH, DEPTH + MASK, MASK))

    photos = files_by_stem(base, is_image)
    maps = files_by_stem(base, lambda path: path.suffix.lower() in DEPTH_SUFFIXES, DEPTH)
    masks = files_by_stem(base, lambda path: path.is_file(), DEPTH + MASK)
    pairs = [(name, path, maps[name]) for name, path in photos.items() if name in maps]
    missing = sorted(photos.keys() - maps.keys())
    if missing:
        raise UserError(f"{base}: {len(missing)} images have no depth map, the first would be {missing[0]}{DEPTH}.npy")
    if not pairs:
        raise UserError(f"{base} holds depth maps named NAME{DEPTH}, but no images NAME")
    return OwnPairs(pairs, {name: masks[name] for name, *_ in pairs if name in masks}, True)
