"""Checks .npy and .npz files before they are loaded: their headers must match the file size. Nothing is unpickled."""

from __future__ import annotations

import math
import zipfile
from pathlib import Path
from typing import IO

import numpy as np

from uvim_fsq.errors import UserError

#: Largest accepted compression ratio of an archive; numbers rarely compress by more than 4.
MAX_RATIO = 100


def check_npy(file: IO[bytes], size: int, name: str | Path) -> tuple[int, ...]:
    """Reads the header of a .npy file of `size` bytes and returns the array's shape.

    `name` is used in messages. Raises UserError for an array that is not numeric or is larger than the file, and
    ValueError if the file is not a .npy.
    """
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    if dtype.hasobject:
        raise UserError(f"{name} holds Python objects, not real numbers; pickled data is never loaded")
    if dtype.kind not in "fiub":
        raise UserError(f"{name} holds {dtype}, not real numbers")
    needed, available = math.prod(shape) * dtype.itemsize, size - file.tell()
    if min(shape, default=0) < 0 or needed > available:
        raise UserError(
            f"{name} declares an array {dtype} {shape} of {needed} bytes but holds {available}; download it again"
        )
    return shape


def check_npz(path: Path) -> None:
    """Raises UserError for a .npz that unpacks to more than `MAX_RATIO` times its size, or whose arrays are larger than
    the file.

    `zipfile` and NumPy raise their own errors for a file that is not a .npz.
    """
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        total, size = sum(member.file_size for member in members), path.stat().st_size
        if total > MAX_RATIO * size:
            raise UserError(f"{path} has {size} bytes and would unpack to {total}; it is not a weights file")
        for member in members:
            if member.filename.endswith(".npy"):
                with archive.open(member) as file:
                    check_npy(file, member.file_size, f"{path}: {member.filename.removesuffix('.npy')}")
