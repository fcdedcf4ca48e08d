"""Panoptic labels and predictions as arrays: two label maps in, one set of segments out (UViM, section 4).

Knows nothing of files. S label side, C classes beside void, K segments of an image.
"""

from __future__ import annotations

import functools

import numpy as np
import torch

from uvim_fsq.tasks.coco_panoptic.segments import Segments


@functools.lru_cache(maxsize=8)
def _pixel_keys(height: int, width: int) -> np.ndarray:
    """x + H * y of every pixel; its mean over a segment is the key of the segment's centre."""
    return (np.arange(width)[None] + height * np.arange(height)[:, None]).ravel().astype(np.float64)


def canonical_order(segments: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Segments by centre of mass, rows first, then columns: key = x + H * y.

    Args:
        segments: (H, W) integers; 1..count are segments, anything else is not looked at.

    Returns:
        The numbers (K,) of the segments that have pixels, in order, and areas (count + 1,) of all.
    """
    height, width = segments.shape
    flat = np.where((segments >= 1) & (segments <= count), segments, 0).ravel()
    area = np.bincount(flat, minlength=count + 1)
    key = np.bincount(flat, weights=_pixel_keys(height, width), minlength=count + 1) / np.maximum(area, 1)
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
    segments: np.ndarray, classes: np.ndarray, unlabelled: np.ndarray, max_instances: int, void: int
) -> dict[str, np.ndarray]:
    """The two label maps of one image.

    Args:
        segments: (S, S) integers 0..K, 0 = void.
        classes: (K + 1,) class 1..C of each segment; entry 0 is not used.
        unlabelled: (K + 1,) bool, segments without label (-1 in both maps), e.g. crowds.
        max_instances: of more segments the largest are kept, the others get -1.
        void: label of void pixels in both maps: 0 (a class, as the reference trains it) or -1 (ignored).

    Returns:
        semantics and instances, (S, S) int16.
    """
    order, area = canonical_order(segments, len(classes) - 1)
    order = order[~unlabelled[order]]
    if len(order) > max_instances:
        largest = np.argsort(-area[order], kind="stable")[:max_instances]
        order = order[np.sort(largest)]
    semantics = np.full(len(classes), -1, np.int16)
    instances = np.full(len(classes), -1, np.int16)
    semantics[order] = classes[order]
    instances[order] = np.arange(1, len(order) + 1)
    semantics[0] = instances[0] = void
    return {"semantics": semantics[segments], "instances": instances[segments]}


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
