"""Encodes segments as two label maps and decodes logits to segments (UViM, arXiv 2205.10337, section 4).

Independent of files. Shapes: B batch, H and W image size, S label size, C classes besides void, K segments of an image,
N instances including void.
"""

from __future__ import annotations

import numpy as np
import torch

from uvim_fsq.data.sample import smallest_integer
from uvim_fsq.tasks.coco_panoptic.segments import Segments


def _runs(segments: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Value, row, first column and length of every run of equal values within the rows of (H, W)."""
    new = np.ones(segments.shape, np.bool_)
    np.not_equal(segments[:, 1:], segments[:, :-1], out=new[:, 1:])
    first = np.flatnonzero(new)
    rows, columns = np.divmod(first, max(segments.shape[1], 1))
    return segments.ravel()[first], rows, columns, np.diff(first, append=segments.size)


def canonical_order(segments: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Orders segments by center of mass (x, y), by the key x + H * y.

    Args:
        segments: (H, W) integers; 1..count are segments, other values are ignored.

    Returns:
        (K,) the numbers of the segments that have pixels, in order, and (count + 1,) the areas of all.
    """
    # Run-length encoding turns a quarter of a million pixels into a few thousand runs. The sums are integers below
    # 2^53, and so exact in float64.
    numbers, rows, columns, lengths = _runs(segments)
    numbers = np.where((numbers >= 1) & (numbers <= count), numbers, 0)
    area = np.bincount(numbers, weights=lengths, minlength=count + 1).astype(np.int64)
    sums = lengths * (columns + segments.shape[0] * rows) + lengths * (lengths - 1) // 2
    key = np.bincount(numbers, weights=sums, minlength=count + 1) / np.maximum(area, 1)
    present = np.flatnonzero(area[1:]) + 1
    return present[np.argsort(key[present], kind="stable")], area


def make_canonical(instances: np.ndarray) -> np.ndarray:
    """Renumbers (H, W) instance numbers to 1..N by `canonical_order`; 0 stays, negative numbers become -1."""
    count = max(int(instances.max(initial=0)), 0)
    order, _ = canonical_order(instances, count)
    table = np.zeros(count + 2, np.int32)
    table[order] = np.arange(1, len(order) + 1)
    table[-1] = -1  # -1 indexes the last entry
    return table[np.maximum(instances, -1)]


def encode_panoptic(
    segments: np.ndarray, classes: np.ndarray, unlabeled: np.ndarray, num_classes: int, max_instances: int, void: int
) -> dict[str, np.ndarray]:
    """The two label maps of one image.

    Args:
        segments: (S, S) integers 0..K, 0 = void.
        classes: (K + 1,) class 1..C of each segment; entry 0 is not used.
        unlabeled: (K + 1,) bool, segments without a label (-1 in both maps), e.g. crowds.
        num_classes: C + 1.
        max_instances: if there are more segments, the largest are kept and the others get -1.
        void: label of void pixels in both maps: 0 (a class, as in the UViM reference code) or -1 (ignored).

    Returns:
        semantics and instances, (S, S), each in the smallest dtype that holds its labels.
    """
    order, area = canonical_order(segments, len(classes) - 1)
    order = order[~unlabeled[order]]
    if len(order) > max_instances:
        largest = np.argsort(-area[order], kind="stable")[:max_instances]
        order = order[np.sort(largest)]
    semantics = np.full(len(classes), -1, smallest_integer(-1, num_classes - 1))
    instances = np.full(len(classes), -1, smallest_integer(-1, max_instances))
    semantics[order] = classes[order]
    instances[order] = np.arange(1, len(order) + 1)
    semantics[0] = instances[0] = void
    # `take` is twice as fast as indexing.
    return {"semantics": semantics.take(segments), "instances": instances.take(segments)}


def panoptic_from_logits(
    semantics: torch.Tensor, instances: torch.Tensor, min_fraction: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """The most likely instance of each pixel, and for each instance the class whose logits have the largest sum over
    its pixels.

    Args:
        semantics: (B, H, W, C + 1) logits, class 0 is void.
        instances: (B, H, W, N) logits.
        min_fraction: instances that cover at most this fraction of the image become void.

    Returns:
        Class 0..C and instance 0..N - 1 of each pixel, both (B, H, W) int64.
    """
    b, h, w, n = instances.shape
    chosen = instances.argmax(-1)
    row = (chosen + torch.arange(b, device=chosen.device)[:, None, None] * n).flatten()
    sums = torch.zeros(b * n, semantics.shape[-1], dtype=torch.float32, device=semantics.device)
    sums.index_add_(0, row, semantics.flatten(0, 2).float())
    area = torch.zeros(b * n, device=row.device).index_add_(0, row, torch.ones_like(row, dtype=torch.float32))
    classes = sums.argmax(-1).masked_fill(area <= min_fraction * h * w, 0)
    return classes[row].view(b, h, w), chosen


def instance_scores(
    semantics: torch.Tensor, instances: torch.Tensor, classes: torch.Tensor, chosen: torch.Tensor
) -> torch.Tensor:
    """How certain each predicted instance is: the mean, over its pixels, of the probability of its class times that of
    its number. Mask transformers score instances alike: class times mean mask probability (arXiv 2112.01527).

    Args:
        semantics, instances: (B, H, W, C + 1) and (B, H, W, N) logits.
        classes, chosen: the class and instance of each pixel, from `panoptic_from_logits`.

    Returns:
        (B, N) float32 in [0, 1]; 0 for instances without pixels.
    """
    b, _, _, n = instances.shape
    log = torch.zeros(chosen.shape, device=chosen.device)
    for logits, pick in ((semantics, classes), (instances, chosen)):
        logits = logits.float()
        log += logits.gather(-1, pick[..., None])[..., 0] - logits.logsumexp(-1)
    row = (chosen + torch.arange(b, device=chosen.device)[:, None, None] * n).flatten()
    sums = torch.zeros(b * n, device=chosen.device).index_add_(0, row, log.exp().flatten())
    area = torch.zeros(b * n, device=row.device).index_add_(0, row, torch.ones_like(row, dtype=torch.float32))
    return (sums / area.clamp(min=1)).view(b, n).clamp(max=1)


def to_segments(
    semantics: np.ndarray, instances: np.ndarray, is_thing: np.ndarray, scores: np.ndarray | None = None
) -> Segments:
    """(H, W) class and instance maps, with one class per instance -> segments 1..K; each stuff class is one segment.

    Args:
        semantics, instances: (H, W) integers 0..C and 0..N - 1.
        is_thing: (C + 1,) bool by class.
        scores: (N,) by instance, if all classes are things.
    """
    # Things keep their instance number; stuff and void pixels of a class are merged.
    key = semantics.astype(np.int64) * 1024 + np.where(is_thing[semantics], instances + 1, 0)
    area = np.bincount(key.ravel())
    keys = np.flatnonzero(area)
    keys = keys[keys >= 1024]
    number = np.zeros(len(area), np.int32)
    number[keys] = np.arange(1, len(keys) + 1)
    classes = (keys // 1024).astype(np.int32)
    scores = None if scores is None else scores[keys % 1024 - 1]
    return Segments(number[key], np.arange(1, len(keys) + 1), classes, np.zeros(len(keys), bool), scores)
