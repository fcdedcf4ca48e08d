"""Panoptic labels and predictions as arrays: two label maps in, one set of segments out (UViM, section 4).

Knows nothing of files. S label side, C classes beside void, K segments of an image.
"""

from __future__ import annotations

import numpy as np
import torch

from uvim_fsq.data.sample import smallest_integer
from uvim_fsq.tasks.coco_panoptic.segments import Segments


def _runs(segments: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Number, row, first column and length of every stretch of equal neighbours within a row of (H, W)."""
    new = np.ones(segments.shape, np.bool_)
    np.not_equal(segments[:, 1:], segments[:, :-1], out=new[:, 1:])
    first = np.flatnonzero(new)
    rows, columns = np.divmod(first, max(segments.shape[1], 1))
    return segments.ravel()[first], rows, columns, np.diff(first, append=segments.size)


def canonical_order(segments: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Segments by centre of mass, rows first, then columns: key = x + H * y.

    Args:
        segments: (H, W) integers; 1..count are segments, anything else is not looked at.

    Returns:
        The numbers (K,) of the segments that have pixels, in order, and areas (count + 1,) of all.
    """
    # Some thousand runs stand for a quarter of a million pixels; the sums are whole numbers below 2^53, hence exact.
    numbers, rows, columns, lengths = _runs(segments)
    numbers = np.where((numbers >= 1) & (numbers <= count), numbers, 0)
    area = np.bincount(numbers, weights=lengths, minlength=count + 1).astype(np.int64)
    sums = lengths * (columns + segments.shape[0] * rows) + lengths * (lengths - 1) // 2
    key = np.bincount(numbers, weights=sums, minlength=count + 1) / np.maximum(area, 1)
    present = np.flatnonzero(area[1:]) + 1
    return present[np.argsort(key[present], kind="stable")], area


def make_canonical(instances: np.ndarray) -> np.ndarray:
    """(H, W) instance numbers -> renumbered 1..N by `canonical_order`; 0 stays, negative numbers become -1."""
    count = max(int(instances.max(initial=0)), 0)
    order, _ = canonical_order(instances, count)
    table = np.zeros(count + 2, np.int32)
    table[order] = np.arange(1, len(order) + 1)
    table[-1] = -1  # where a negative number looks
    return table[np.maximum(instances, -1)]


def encode_panoptic(
    segments: np.ndarray, classes: np.ndarray, unlabelled: np.ndarray, num_classes: int, max_instances: int, void: int
) -> dict[str, np.ndarray]:
    """The two label maps of one image.

    Args:
        segments: (S, S) integers 0..K, 0 = void.
        classes: (K + 1,) class 1..C of each segment; entry 0 is not used.
        unlabelled: (K + 1,) bool, segments without label (-1 in both maps), e.g. crowds.
        num_classes: C + 1.
        max_instances: of more segments the largest are kept, the others get -1.
        void: label of void pixels in both maps: 0 (a class, as the reference trains it) or -1 (ignored).

    Returns:
        semantics and instances, (S, S), each of the smallest type that holds its labels.
    """
    order, area = canonical_order(segments, len(classes) - 1)
    order = order[~unlabelled[order]]
    if len(order) > max_instances:
        largest = np.argsort(-area[order], kind="stable")[:max_instances]
        order = order[np.sort(largest)]
    semantics = np.full(len(classes), -1, smallest_integer(-1, num_classes - 1))
    instances = np.full(len(classes), -1, smallest_integer(-1, max_instances))
    semantics[order] = classes[order]
    instances[order] = np.arange(1, len(order) + 1)
    semantics[0] = instances[0] = void
    # `take` is twice as fast as brackets.
    return {"semantics": semantics.take(segments), "instances": instances.take(segments)}


def panoptic_from_logits(
    semantics: torch.Tensor, instances: torch.Tensor, min_fraction: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each pixel's likeliest instance, and for every instance the class with the largest sum of logits over its pixels.

    Args:
        semantics: (B, H, W, C + 1) logits, class 0 is void.
        instances: (B, H, W, N) logits.
        min_fraction: instances of at most this share of the image's area become void.

    Returns:
        Class 0..C and instance 0..N-1 of each pixel, (B, H, W) int64.
    """
    b, h, w, n = instances.shape
    chosen = instances.argmax(-1)
    row = (chosen + torch.arange(b, device=chosen.device)[:, None, None] * n).flatten()
    sums = torch.zeros(b * n, semantics.shape[-1], dtype=torch.float32, device=semantics.device)
    sums.index_add_(0, row, semantics.flatten(0, 2).float())
    area = torch.bincount(row, minlength=b * n)
    classes = sums.argmax(-1).masked_fill(area <= min_fraction * h * w, 0)
    return classes[row].view(b, h, w), chosen


def to_segments(semantics: np.ndarray, instances: np.ndarray, is_thing: np.ndarray) -> Segments:
    """Class and instance maps (H, W), one class per instance -> segments 1..K; the stuff of a class is one segment.

    `is_thing`: (C + 1,) bool by class.
    """
    # Things keep their instance, stuff and void fall together.
    key = semantics.astype(np.int64) * 1024 + np.where(is_thing[semantics], instances + 1, 0)
    area = np.bincount(key.ravel())
    keys = np.flatnonzero(area)
    keys = keys[keys >= 1024]
    number = np.zeros(len(area), np.int32)
    number[keys] = np.arange(1, len(keys) + 1)
    classes = (keys // 1024).astype(np.int32)
    return Segments(number[key], np.arange(1, len(keys) + 1), classes, np.zeros(len(keys), bool))
