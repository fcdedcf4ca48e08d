"""Pictures and HDF5 files as bytes in memory, to be written in one piece.

Left to write by themselves, Pillow cuts a file short in silence when the disk fills up, and HDF5 ends the process.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import h5py
import numpy as np
from PIL import Image


def picture_bytes(pixels: np.ndarray, format: str = "PNG", **options: Any) -> bytes:
    """(H, W) uint8 or uint16, or (H, W, 3) uint8 -> a picture file; `options` are Pillow's for the format."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=format, **options)
    return buffer.getvalue()


def hdf5_bytes(arrays: Mapping[str, np.ndarray], *, checked: bool = False) -> bytes:
    """An HDF5 file with a dataset per entry. `checked`: with checksums of all that is in it, values and structure, so
    that reading a damaged one fails."""
    buffer = io.BytesIO()
    with h5py.File(buffer, "w", libver="v110" if checked else None) as file:
        for name, array in arrays.items():
            chunks = array.shape if checked else None
            file.create_dataset(name, data=array, chunks=chunks, fletcher32=checked)
    return buffer.getvalue()
