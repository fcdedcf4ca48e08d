"""Reads `splits.mat` of NYU Depth v2, which assigns the images of the labeled .mat to splits.

Implements MATLAB's format 5 for plain numeric arrays, because SciPy's reader crashes the process on some damaged files.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from uvim_fsq.errors import UserError

#: MATLAB's codes for how numbers are stored.
STORED = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
MATRIX, COMPRESSED = 14, 15
#: Bytes to read and to decompress at most; more than any list of images needs.
LARGEST = 1 << 26


def read_splits(file: Path) -> tuple[list[int], list[int]]:
    """0-based rows of the training and of the test images. Raises UserError if the file is missing or damaged."""
    if not file.is_file():
        raise UserError(f"{file} is missing; download it from the data set's page, next to the labeled .mat")
    try:
        wanted = ("trainNdxs", "testNdxs")
        # Other arrays are dropped at once: each may decompress to a thousand times its size in the file.
        arrays = {name: values for name, values in _arrays(file.read_bytes()[:LARGEST]) if name in wanted}
        if len(arrays) < len(wanted):
            raise ValueError("it lacks trainNdxs or testNdxs")
        train, test = arrays["trainNdxs"], arrays["testNdxs"]
        rows = np.concatenate([train, test])
        if not (len(train) and np.array_equal(rows, rows.astype(np.int64)) and rows.min() >= 1):
            raise ValueError("it does not list image numbers")
        if len(np.unique(rows)) < len(rows):
            raise ValueError("it lists an image twice")
    except (ValueError, OSError, struct.error, zlib.error, OverflowError) as error:
        raise UserError(f"{file} is damaged ({' '.join(str(error).split())}); download it again") from error
    return [int(row) - 1 for row in train], [int(row) - 1 for row in test]


def _arrays(data: bytes) -> Iterator[tuple[str, np.ndarray]]:
    """(name, values) of the numeric arrays of a file."""
    if data[126:128] != b"IM":
        raise ValueError("not a MATLAB file of format 5")
    for kind, content in _elements(data[128:]):
        if kind == COMPRESSED:
            unpack = zlib.decompressobj()
            plain = unpack.decompress(content, LARGEST)
            if not unpack.eof:
                raise ValueError("truncated")
            ((kind, content),) = _elements(plain)
        if kind == MATRIX:
            _, _, (_, name), (stored, values), *_ = [*_elements(content), (0, b""), (0, b"")]
            if stored in STORED:
                yield name.decode("ascii", "replace"), np.frombuffer(values, f"<{STORED[stored]}")


def _elements(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(type, content) of the data elements, in order."""
    at = 0
    while at + 8 <= len(data):
        kind, size = struct.unpack_from("<II", data, at)
        if kind >> 16:  # a small element: up to 4 bytes of content, stored within the 8-byte tag
            kind, size, start, end = kind & 0xFFFF, kind >> 16, at + 4, at + 8
        else:
            start = at + 8
            end = start + size + (0 if kind == COMPRESSED else -size % 8)
        if size > end - start or start + size > len(data):
            raise ValueError("truncated")
        yield kind, data[start : start + size]
        at = end
