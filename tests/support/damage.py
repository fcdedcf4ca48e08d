"""Damages files."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from uvim_fsq.data.folders import IMAGE_SUFFIXES


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """One bit or byte changed, the end cut off, or some bytes overwritten."""
    at, changed = int(rng.integers(len(data))), bytearray(data)
    kind = rng.integers(5)
    if kind == 0:
        changed[at] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        changed[at] = (changed[at] + int(rng.integers(1, 256))) % 256
    elif kind == 2:
        del changed[at:]
    else:
        end = min(len(data), at + (8 if kind == 3 else 64))
        changed[at:end] = rng.bytes(end - at) if kind == 3 else bytes(end - at)
    return bytes(changed)


def blank_images(root: Path) -> None:
    """Overwrites every image below `root` with zeros, without changing its size or time."""
    for file in root.rglob("*"):
        if file.suffix.lower() in IMAGE_SUFFIXES:
            stat = file.stat()
            file.write_bytes(bytes(stat.st_size))
            os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
