"""Encodes images and HDF5 files in memory, so that they can be written at once.

When the disk fills up, Pillow silently truncates the file it writes, and HDF5 aborts the process.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import cv2
import h5py
import numpy as np
from PIL import Image


def picture_bytes(pixels: np.ndarray, format: str = "PNG", **options: Any) -> bytes:
    """(H, W) uint8 or uint16, or (H, W, 3) uint8 -> an image file; `options` are Pillow's for the format."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=format, **options)
    return buffer.getvalue()


def deep_png_bytes(pixels: np.ndarray) -> bytes:
    """(H, W, 3) uint16 RGB -> a PNG file of 16 bits per channel, which Pillow cannot write."""
    return cv2.imencode(".png", np.ascontiguousarray(pixels[..., ::-1]))[1].tobytes()


def hdf5_bytes(arrays: Mapping[str, np.ndarray], *, checked: bool = False) -> bytes:
    """An HDF5 file with one dataset per entry. `checked` adds checksums of values and structure, so that reading a
    damaged file fails.
    """
    buffer = io.BytesIO()
    with h5py.File(buffer, "w", libver="v110" if checked else None) as file:
        for name, array in arrays.items():
            chunks = array.shape if checked else None
            file.create_dataset(name, data=array, chunks=chunks, fletcher32=checked)
    return buffer.getvalue()
