"""Panoptic quality by the size of segments, for reports."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from uvim_fsq.data.resize import resize_nearest
from uvim_fsq.data.sample import Sample
from uvim_fsq.tasks.base import Breakdown, Matrix
from uvim_fsq.tasks.coco_panoptic.metrics import match_segments, overlap_table
from uvim_fsq.tasks.coco_panoptic.segments import Segments

#: Ends of the ranges of segment sizes, as shares of the image; the last range ends at 1.
EDGES = (0.001, 0.004, 0.016, 0.064, 0.25)
RANGES = (
    *("below 0.1%", "0.1 to 0.4%", "0.4 to 1.6%", "1.6 to 6.4%", "6.4 to 25%"),
    "25% and more",
)


class QualityBySize(Breakdown):
    """PQ, SQ and RQ (percent) of the segments in each range of sizes.

    Matches and false negatives belong to the size of the true segment, false positives to that of the predicted one.
    Segments of all classes are pooled, whereas the protocol's PQ is a mean over classes.

    Args:
        num_classes: C.
        background: as for `PanopticMetric`.
    """

    def __init__(self, num_classes: int, *, background: bool) -> None:
        self.num_classes, self.background = num_classes, background
        # IoU of matches, matches, false positives, false negatives
        self.counts = np.zeros((len(RANGES), 4))

    def update(self, prediction: Any, sample: Sample) -> None:
        truth: Segments = sample.meta["segments"]
        resized = prediction.at(resize_nearest(prediction.ids, (truth.ids.shape[0], truth.ids.shape[1])))
        overlap = overlap_table(resized, truth)
        found = match_segments(overlap, resized, truth, self.num_classes, self.background)
        true, predicted = (np.digitize(overlap.sum(axis)[1:] / truth.ids.size, EDGES) for axis in (1, 0))
        matched = true[found.rows]
        self.counts[:, 0] += np.bincount(matched, found.iou, len(RANGES))
        for i, sizes in enumerate((matched, predicted[found.extra], true[found.missed]), start=1):
            self.counts[:, i] += np.bincount(sizes, minlength=len(RANGES))

    def state(self) -> dict[str, np.ndarray]:
        return {"counts": self.counts.copy()}

    def tables(self, state: Mapping[str, np.ndarray]) -> dict[str, Matrix]:
        iou, matches, extra, missed = state["counts"].T
        with np.errstate(invalid="ignore"):
            rq = matches / (matches + extra / 2 + missed / 2)
            # Without a match there is no quality of segmentation, and PQ is 0.
            sq = iou / matches
            pq = np.where(matches > 0, sq, 0) * rq
        columns = np.stack([100 * pq, 100 * sq, 100 * rq, matches + missed, extra + matches], 1)
        names = ("PQ", "SQ", "RQ", "true segments", "predicted segments")
        return {"Quality by size of the segment, as a share of the image": Matrix(RANGES, names, columns)}
