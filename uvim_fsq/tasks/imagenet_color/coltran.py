"""The image lists and the resizing of the ColTran FID protocol (arXiv 2102.04432).

"The reference" below is the UViM reference code (big_vision, JAX). Shapes: H, W native size; S side of a square image.
"""

from __future__ import annotations

import hashlib
from functools import cache, lru_cache
from pathlib import Path

import numpy as np

NUM_VALIDATION = 50_000
#: The reference reads the validation set from 64 shards, interleaved in blocks of 16 shards by 16 names.
SHARDS, BLOCK = 64, 16
LIST_LENGTH = 5_000
REFERENCE_START = 10_000
SIZE = 256


def evaluation_names() -> list[str]:
    """The 5,000 file names `ILSVRC2012_val_000xxxxx.JPEG` of the photos to colorize, in the reference's order."""
    return list(_reading_order()[:LIST_LENGTH])


def reference_names() -> list[str]:
    """The 5,000 file names of the reference set for FID; disjoint from `evaluation_names`."""
    return list(_reading_order()[REFERENCE_START : REFERENCE_START + LIST_LENGTH])


@cache
def _reading_order() -> tuple[str, ...]:
    """All 50,000 validation file names in the order of the reference's data loader."""
    names = [f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, NUM_VALIDATION + 1)]
    names.sort(key=lambda name: hashlib.md5(b"validation" + name.encode(), usedforsecurity=False).digest())
    # Python rounds halves to even, as in the code that wrote the shards.
    ends = [round(NUM_VALIDATION * (shard + 1) / SHARDS) for shard in range(SHARDS)]
    keyed = [
        ((shard // BLOCK, j // BLOCK, shard % BLOCK, j % BLOCK), name)
        for shard, (start, end) in enumerate(zip([0, *ends], ends, strict=False))
        for j, name in enumerate(names[start:end])
    ]
    return tuple(name for _, name in sorted(keyed))


def write_lists(out: Path) -> list[Path]:
    """Writes coltran_evaluation.txt and coltran_reference.txt to folder `out`, one name per line; returns the paths."""
    out.mkdir(parents=True, exist_ok=True)
    files = {out / "coltran_evaluation.txt": evaluation_names(), out / "coltran_reference.txt": reference_names()}
    for path, names in files.items():
        path.write_text("\n".join(names) + "\n")
    return list(files)


@lru_cache(maxsize=64)
def _overlaps(size: int, new: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights of an area resize along one axis: (new,) int64 first source pixel, (taps, new) float64 weights.

    New pixel i covers [i, i + 1) * size / new. Row k of the weights belongs to source pixel first + k and is the
    fraction of the interval that this pixel covers.
    """
    edges = np.arange(new + 1, dtype=np.int64) * size
    start, end = edges[:-1], edges[1:]
    first = start // new
    taps = int((-(-end // new) - first).max())
    pixel = first + np.arange(taps)[:, None]
    # In units of 1 / new of a source pixel all bounds are integers, so the overlaps are exact.
    overlaps = np.minimum(end, (pixel + 1) * new) - np.maximum(start, pixel * new)
    return first, np.maximum(overlaps, 0) / size


def _resize_axis(image: np.ndarray, size: int, axis: int) -> np.ndarray:
    """Area-resizes (H, W, C) to length `size` along `axis` (0 or 1); float64."""
    old = image.shape[axis]
    first, fractions = _overlaps(old, size)
    weights = fractions.reshape(-1, size, 1, 1) if axis == 0 else fractions.reshape(-1, 1, size, 1)
    result = np.take(image, first, axis) * weights[0]
    for step, weight in enumerate(weights[1:], 1):
        # Beyond the last row or column the weight is 0.
        result += np.take(image, np.minimum(first + step, old - 1), axis) * weight
    return result


def area_resize(image: np.ndarray, size: int) -> np.ndarray:
    """(S, S, 3) uint8 or float -> (size, size, 3) float64: each pixel is the mean of the area that it covers.

    Equals TensorFlow's AREA method without its float32 rounding. float64 represents exact halves, which later rounding
    depends on.
    """
    assert image.ndim == 3 and image.shape[0] == image.shape[1], f"expected (S, S, 3), got {image.shape}"
    return _resize_axis(_resize_axis(image, size, 0), size, 1)


def crop_and_resize(image: np.ndarray, size: int) -> np.ndarray:
    """(H, W, 3) uint8 -> (size, size, 3) uint8: center crop to the shorter side, area resize, round half to even."""
    height, width = image.shape[:2]
    side = min(height, width)
    # If the remainder is odd, the extra row or column is cropped at the bottom or right, as in TensorFlow.
    top, left = (height - side) // 2, (width - side) // 2
    resized = area_resize(image[top : top + side, left : left + side], size)
    return np.rint(resized).astype(np.uint8)


def prediction_uint8(y: np.ndarray, size: int = SIZE) -> np.ndarray:
    """A colorized photo (S, S, 3) in [-1, 1] -> (size, size, 3) uint8, the input of the Inception network.

    NaN becomes 0 (mid-gray), infinite values become -1 or 1.
    """
    y = np.nan_to_num(y, nan=0.0, posinf=1.0, neginf=-1.0)
    levels = np.rint((area_resize(y, size) + 1) * 128)
    return np.clip(levels, 0, 255).astype(np.uint8)
