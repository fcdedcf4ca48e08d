"""Finds image files and the folders train/ and val/ of a data set. Does not import torch.

Only the exact names train/ and val/ are used; error messages suggest renaming folders such as training/.
"""

from __future__ import annotations

import codecs
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from uvim_fsq.errors import UserError

#: File name extensions of images, in lower case.
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"}
#: Names that people give to the two folders, in lower case.
MEANT = {
    "train": ("train", "training", "trainset", "train_set", "training_set"),
    "val": ("val", "valid", "validation", "validate", "valset", "val_set", "validation_set"),
}
#: Further names for val/; too ambiguous to recognize a data set by.
PERHAPS_VAL = ("test", "testing", "dev", "eval", "holdout")


def _folders(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else []


def has_split_folders(root: Path) -> bool:
    """Whether `root` contains train/ or val/, or a folder that is clearly meant as one of them."""
    return any(name.lower() in names for name in _folders(root) for names in MEANT.values())


def split_folder(root: Path, part: str) -> Path:
    """The folder `root`/`part`, where `part` is "train" or "val". Raises UserError naming the folders found instead."""
    folder = root / part
    if folder.is_dir():
        return folder
    names = MEANT[part] + (PERHAPS_VAL if part == "val" else ())
    there = _folders(root)
    close = [name for name in there if name.lower() in names]
    found = and_list([f"{name}/" for name in there]) or "no folder"
    remedy = f"rename {close[0]}/ to {part}/" if close else f"add {part}/, or set data.root to a folder with both"
    raise UserError(f"{root}: found {found}, but no {part}/: {remedy}")


def and_list(words: Sequence[str], most: int = 6) -> str:
    """ "a, b and c"; beyond `most` words, the first ones and the number of the others."""
    if len(words) > most:
        return f"{', '.join(words[:most])} and {len(words) - most} more"
    return " and ".join([", ".join(words[:-1])] * (len(words) > 1) + list(words[-1:]))


def expand_lists(inputs: Sequence[str]) -> list[str]:
    """The inputs with each `@FILE` replaced by the paths listed in FILE, and `-` by those on standard input.

    One path a line, relative to the current directory; or separated by zero bytes, as `find -print0` writes them. Blank
    lines and a byte order mark are left out. A file that is itself named `@...` or `-` is taken as it is.

    Raises UserError for a list that cannot be read or lists nothing.
    """
    found: list[str] = []
    for entry in inputs:
        if (not entry.startswith("@") and entry != "-") or os.path.lexists(entry):
            found.append(entry)
            continue
        name = "standard input" if entry == "-" else entry[1:]
        try:
            content = sys.stdin.buffer.read() if entry == "-" else Path(name).read_bytes()
        except (OSError, ValueError) as error:
            raise UserError(f"the list {name} cannot be read ({getattr(error, 'strerror', None) or error})") from error
        content = content.removeprefix(codecs.BOM_UTF8)
        zeros = b"\0" in content
        lines = content.split(b"\0") if zeros else [line.strip() for line in content.splitlines()]
        listed = [os.fsdecode(line) for line in lines if line]
        if not listed:
            raise UserError(f"{name} lists no pictures; write one path a line")
        found += listed
    return found


def natural_order(path: Path) -> list[tuple[list[str | int], str]]:
    """A key that sorts paths by name, numbers in names by value: frame2 before frame10."""
    parts = ((re.split("([0-9]+)", part), part) for part in path.parts)
    return [([int(x) if i % 2 else x for i, x in enumerate(pieces)], part) for pieces, part in parts]


def list_images(inputs: list[str]) -> list[Path]:
    """The given files, and the images in the given folders (searched recursively, in natural order).

    Raises UserError for a missing path or a folder without images.
    """
    files: list[Path] = []
    for entry in map(Path, inputs):
        try:
            entry.is_dir()
        except OSError as error:  # e.g. a name that is too long
            raise UserError(f"{str(entry)[:200]}: {error.strerror}") from error
        if entry.is_dir():
            found = sorted((p for p in entry.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES), key=natural_order)
            if not found:
                raise UserError(f"{entry}: no images in this folder")
            files += found
        elif entry.is_file():
            files.append(entry)
        else:
            raise UserError(f"{entry}: no such file or folder")
    return files


def files_by_stem(folder: Path, wanted: Callable[[Path], bool], suffix: str = "") -> dict[str, Path]:
    """The files below `folder` by path without extension and `suffix`, sorted; others than those with it are left out.

    Raises UserError if two have the same.
    """
    found: dict[str, Path] = {}
    for path in sorted(filter(wanted, folder.rglob("*"))):
        if not path.stem.endswith(suffix):
            continue
        stem = str(path.relative_to(folder).with_suffix("")).removesuffix(suffix)
        other = found.setdefault(stem, path)
        if other != path:
            raise UserError(f"{other} and {path.name} have the same name; remove one of them")
    return found
