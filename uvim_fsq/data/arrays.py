"""NumPy's files, whose headers are believed only as far as the file's size bears them out. Nothing is unpickled."""

from __future__ import annotations

import math
import zipfile
from pathlib import Path
from typing import IO

import numpy as np

from uvim_fsq.errors import UserError

#: Bytes that a compressed .npz may unpack to per byte of the file; of numbers, 4 is much.
MAX_RATIO = 100


def check_npy(file: IO[bytes], size: int, name: str | Path) -> tuple[int, ...]:
    """Reads the header of a .npy of `size` bytes and returns the array's shape.

    Raises UserError for an array of anything but numbers, and one that the file cannot hold; ValueError for no .npy.
    """
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    if dtype.hasobject:
        raise UserError(f"{name} holds Python objects, not real numbers; pickled data are never loaded")
    if dtype.kind not in "fiub":
        raise UserError(f"{name} holds {dtype}, not real numbers")
    needed, there = math.prod(shape) * dtype.itemsize, size - file.tell()
    if min(shape, default=0) < 0 or needed > there:
        raise UserError(f"{name} claims an array {dtype} {shape} of {needed} bytes but holds {there}; fetch it again")
    return shape


def check_npz(path: Path) -> None:
    """Raises UserError for a .npz that unpacks to far more than its size, or with an array that it cannot hold; as
    `zipfile` and NumPy do for what is none."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        total, size = sum(member.file_size for member in members), path.stat().st_size
        if total > MAX_RATIO * size:
            raise UserError(f"{path} has {size} bytes and would unpack to {total}; it is no file of weights")
        for member in members:
            if member.filename.endswith(".npy"):
                with archive.open(member) as file:
                    check_npy(file, member.file_size, f"{path}: {member.filename.removesuffix('.npy')}")
