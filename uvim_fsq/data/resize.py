"""Resizing of arrays: nearest neighbor for label maps, bilinear without antialiasing for images."""

from __future__ import annotations

import cv2
import numpy as np

from uvim_fsq.data.sample import Array


def nearest_index(size: int, new: int) -> np.ndarray:
    """(new,) int64 source positions floor((i + 0.5) * size / new) of nearest-neighbor resizing from `size` to `new`."""
    return np.minimum(((np.arange(new) * 2 + 1) * size) // (2 * new), size - 1)


def resize_nearest(array: Array, size: tuple[int, int]) -> Array:
    """(H, W, ...) of any dtype -> (height, width, ...) by nearest neighbor with exact half-pixel centers.

    `F.interpolate`, PIL and OpenCV pick other pixels. Returns `array` itself if it has that size already.
    """
    if array.shape[:2] == tuple(size):
        return array
    rows, columns = nearest_index(array.shape[0], size[0]), nearest_index(array.shape[1], size[1])
    # Two takes are several times faster than indexing with a pair of index arrays.
    return array.take(rows, 0).take(columns, 1)


#: Interpolation of label maps for the models: half-pixel centers, up to the rounding of OpenCV's 16-bit fractions.
#: OpenCV's INTER_NEAREST instead is off by one pixel to the left in half of the columns.
LABEL_INTERPOLATION = cv2.INTER_NEAREST_EXACT


def resize_label_map(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W) or (H, W, C) int32 or float32 -> (height, width[, C]) with `LABEL_INTERPOLATION`."""
    return _resize(values, size, LABEL_INTERPOLATION)


def _resize(values: np.ndarray, size: tuple[int, int], interpolation: int) -> np.ndarray:
    if values.shape[:2] == tuple(size):
        return values
    if values.ndim == 2:
        return cv2.resize(values, (size[1], size[0]), interpolation=interpolation)
    parts = [
        cv2.resize(values[..., chunk], (size[1], size[0]), interpolation=interpolation) for chunk in _chunks(values)
    ]
    # OpenCV drops a last axis of length 1.
    whole = [part.reshape(*size, -1) for part in parts]
    return whole[0] if len(whole) == 1 else np.concatenate(whole, axis=-1)


def _chunks(values: np.ndarray) -> list[slice]:
    """Groups of channels to resize together: up to 4 at once, more in groups of 4, a remainder of 2 one by one.

    Albumentations groups them in the same way in training, and the last bit of bilinear resizing depends on it.
    """
    channels = values.shape[2]
    starts = list(range(0, channels, 4))
    if channels > 4 and channels % 4 == 2:
        starts.append(channels - 1)
    return [slice(first, last) for first, last in zip(starts, [*starts[1:], channels], strict=True)]


def resize_linear(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W, C) uint8 or float32 -> (height, width, C), bilinear with half-pixel centers, without antialiasing."""
    return _resize(image, size, cv2.INTER_LINEAR)
