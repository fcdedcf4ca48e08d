"""The package's resizing: nearest neighbour for maps, bilinear without antialiasing for images."""

from __future__ import annotations

import cv2
import numpy as np

from uvim_fsq.data.sample import Array


def nearest_index(size: int, new: int) -> np.ndarray:
    """(new,) int64 source positions floor((i + 0.5) * size / new)."""
    return np.minimum(((np.arange(new) * 2 + 1) * size) // (2 * new), size - 1)


def resize_nearest(array: Array, size: tuple[int, int]) -> Array:
    """(H, W, ...) of any dtype -> (height, width, ...), half-pixel centres; `F.interpolate`, PIL and OpenCV differ."""
    if array.shape[:2] == tuple(size):
        return array
    rows, columns = nearest_index(array.shape[0], size[0]), nearest_index(array.shape[1], size[1])
    # Two takes are several times quicker than one pair of index arrays.
    return array.take(rows, 0).take(columns, 1)


#: For label maps on their way to the models: half-pixel centres up to the rounding of OpenCV's 16-bit fractions. Its
#: plain INTER_NEAREST takes the pixel to the left of the centre for half of the columns.
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
    # OpenCV drops a last axis of 1.
    whole = [part.reshape(*size, -1) for part in parts]
    return whole[0] if len(whole) == 1 else np.concatenate(whole, axis=-1)


def _chunks(values: np.ndarray) -> list[slice]:
    """Channels that OpenCV resizes together. The same as Albumentations' in training, since the last bit of bilinear
    resizing depends on them: up to 4 channels at once, more of them in fours, and a remainder of 2 one by one."""
    channels = values.shape[2]
    starts = list(range(0, channels, 4))
    if channels > 4 and channels % 4 == 2:
        starts.append(channels - 1)
    return [slice(first, last) for first, last in zip(starts, [*starts[1:], channels], strict=True)]


def resize_linear(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W, C) uint8 or float32 -> (height, width, C), bilinear with half-pixel centres and without antialiasing."""
    return _resize(image, size, cv2.INTER_LINEAR)
