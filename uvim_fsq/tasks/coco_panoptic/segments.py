"""The segments of one image and their RGB encoding in COCO's id PNGs.

Shapes: H, W image size; K segments; C classes besides void.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import cv2
import numpy as np

from uvim_fsq.errors import UserError

#: An id is stored in the three bytes of a pixel; 0 is void.
MAX_ID = (1 << 24) - 1
_PAGE_BITS = 10
_NO_PAGE = (MAX_ID >> _PAGE_BITS) + 1


@dataclass(frozen=True, eq=False)
class Segments:
    """A panoptic prediction or ground truth.

    Attributes:
        ids: (H, W) int32; 0 = void, other values are segment ids.
        segment_ids: (K,) distinct integers 1..2^24 - 1, in the order of the JSON; a segment may have no pixels.
        classes: (K,) int32 contiguous classes 1..C.
        crowd: (K,) bool: regions of many things that were not annotated one by one; all False in predictions.
        scores: (K,) float in [0, 1], how certain each segment of a prediction is, or None if nobody needs it.
    """

    ids: np.ndarray
    segment_ids: np.ndarray
    classes: np.ndarray
    crowd: np.ndarray
    scores: np.ndarray | None = None

    def __post_init__(self) -> None:
        assert self.ids.ndim == 2, self.ids.shape
        assert self.segment_ids.shape == self.classes.shape == self.crowd.shape == (len(self.segment_ids),)
        assert self.crowd.dtype == bool, self.crowd.dtype
        assert self.scores is None or self.scores.shape == self.classes.shape, self.scores.shape

    def at(self, ids: np.ndarray) -> Segments:
        """The same segments with another map of their ids, e.g. resized."""
        return dataclasses.replace(self, ids=ids)

    def present(self) -> Segments:
        """The segments that have pixels, renumbered 1..P in order; the ids must be 0..K."""
        area = np.bincount(self.ids.ravel(), minlength=len(self.segment_ids) + 1)
        kept = np.flatnonzero(area[1:])
        table = np.zeros(len(area), np.int32)
        table[kept + 1] = np.arange(1, len(kept) + 1)
        scores = None if self.scores is None else self.scores[kept]
        return Segments(table[self.ids], np.arange(1, len(kept) + 1), self.classes[kept], self.crowd[kept], scores)


def rgb_to_ids(rgb: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 RGB -> (H, W) int32 ids, R + 256 G + 65536 B."""
    assert rgb.dtype == np.uint8 and rgb.ndim == 3 and rgb.shape[2] == 3, (rgb.dtype, rgb.shape)
    # OpenCV's BGR to BGRA keeps the byte order.
    return rgba_to_ids(cv2.cvtColor(np.ascontiguousarray(rgb), cv2.COLOR_BGR2BGRA))


def rgba_to_ids(rgba: np.ndarray) -> np.ndarray:
    """(H, W, 4) uint8, contiguous, the fourth channel ignored -> (H, W) int32 ids, R + 256 G + 65536 B."""
    assert rgba.dtype == np.uint8 and rgba.ndim == 3 and rgba.shape[2] == 4, (rgba.dtype, rgba.shape)
    # Four bytes are one little-endian integer.
    return (rgba.view("<i4")[..., 0] & MAX_ID).astype(np.int32, copy=False)


def ids_to_rgb(ids: np.ndarray) -> np.ndarray:
    """(H, W) integer ids 0..2^24 - 1 -> (H, W, 3) uint8 RGB; the inverse of `rgb_to_ids`."""
    four = np.ascontiguousarray(ids, "<i4")[..., None].view(np.uint8)
    return cv2.cvtColor(four, cv2.COLOR_BGRA2BGR)


def segment_index(values: np.ndarray, segment_ids: np.ndarray) -> np.ndarray:
    """Ids -> their positions in `segment_ids`.

    Args:
        values: any shape, int32.
        segment_ids: (K,) integers.

    Returns:
        int32 array of the same shape: 0 = void, k + 1 = `segment_ids[k]`, -1 = an id that is not listed.

    Raises:
        UserError: a listed id is not in 1..2^24 - 1, or is listed twice.
    """
    _check_listed(segment_ids)
    # Neighbors mostly have the same id, so few have to be looked up. In noise it is faster to look up all.
    flat = values.ravel()
    first = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
    if 8 * len(first) > len(flat):
        return _look_up(values, segment_ids)
    lengths = np.diff(first, append=len(flat))
    return np.repeat(_look_up(flat[first], segment_ids), lengths).reshape(values.shape)


def _look_up(values: np.ndarray, segment_ids: np.ndarray) -> np.ndarray:
    # A two-level table: filling a flat one of 2^24 entries costs more, and searching among sorted ids is slower still.
    listed = np.concatenate([[0], segment_ids]).astype(np.int64)
    pages, page_of_id = np.unique(listed >> _PAGE_BITS, return_inverse=True)
    page_number = np.zeros(_NO_PAGE + 1, np.int32)
    page_number[pages] = np.arange(1, len(pages) + 1)
    table = np.full((len(pages) + 1, 1 << _PAGE_BITS), -1, np.int32)
    table[page_of_id + 1, listed & ((1 << _PAGE_BITS) - 1)] = np.arange(len(listed))
    # As unsigned integers, negative values are large, and "clip" maps large values to the empty page.
    unsigned = values.astype(np.uint32)
    position = page_number.take(unsigned >> _PAGE_BITS, mode="clip")
    position <<= _PAGE_BITS
    position |= (unsigned & ((1 << _PAGE_BITS) - 1)).astype(np.int32)
    return table.ravel().take(position)


def _check_listed(segment_ids: np.ndarray) -> None:
    unique, times = np.unique(segment_ids, return_counts=True)
    if len(unique) and not (unique[0] >= 1 and unique[-1] <= MAX_ID):
        wrong = unique[0] if unique[0] < 1 else unique[-1]
        raise UserError(f"segment id {wrong} is listed, but ids are 1..{MAX_ID} (0 is void): renumber the segments")
    if len(unique) < len(segment_ids):
        raise UserError(f"segment id {unique[times.argmax()]} is listed twice: give every segment its own id")
