"""Panoptic quality (Kirillov et al., arXiv 1801.00868) with COCO's rules for void and crowd regions.

Shapes: G ground-truth segments, P predicted segments, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from uvim_fsq.data.resize import resize_nearest
from uvim_fsq.data.sample import Sample
from uvim_fsq.errors import UserError
from uvim_fsq.tasks.base import Metric
from uvim_fsq.tasks.coco_panoptic.segments import Segments, segment_index


def overlap_table(prediction: Segments, truth: Segments) -> np.ndarray:
    """(G + 1, P + 1) float64 pixel counts of each pair of segments; row 0 and column 0 are void.

    Both `ids` must have the same shape. Raises UserError if a pixel's id is not among the segments.
    """
    assert prediction.ids.shape == truth.ids.shape, (prediction.ids.shape, truth.ids.shape)
    # Run-length encode the pairs, so that only a few thousand runs instead of all pixels have to be looked up.
    p, t = prediction.ids.ravel(), truth.ids.ravel()
    last = np.empty(t.size, bool)
    last[-1:] = True
    np.not_equal(t[1:], t[:-1], out=last[:-1])
    last[:-1] |= p[1:] != p[:-1]
    ends = np.flatnonzero(last)
    lengths = np.diff(ends, prepend=-1)
    rows, columns = segment_index(t[ends], truth.segment_ids), segment_index(p[ends], prediction.segment_ids)
    if (rows < 0).any():
        unknown = t[ends][rows < 0][0]
        raise UserError(
            f"PNG holds segment id {unknown} that the JSON does not list: list it in segments_info or make it 0 (void)"
        )
    if (columns < 0).any():
        raise UserError(f"the prediction holds segment id {p[ends][columns < 0][0]} that is not among its segments")
    shape = len(truth.segment_ids) + 1, len(prediction.segment_ids) + 1
    pair = rows.astype(np.int64) * shape[1] + columns
    return np.bincount(pair, weights=lengths, minlength=shape[0] * shape[1]).reshape(shape)


def count_matches(prediction: Segments, truth: Segments, num_classes: int) -> np.ndarray:
    """The contribution of one image to the score of each class, counted as in COCO's panopticapi.

    A predicted and a true segment of the same class match if their IoU exceeds 0.5; the union excludes the truth's void
    pixels. Crowds neither match nor count as false negatives. An unmatched prediction is not a false positive if more
    than half of its area is void or crowd of its class; if there are several such crowds, only the last one listed
    counts. Areas are counted in pixels. A listed true segment without pixels is a false negative; a prediction without
    pixels is ignored.

    Returns:
        (4, C) float64: sum of the matches' IoU, matches, false positives, false negatives.

    Raises:
        UserError: a pixel's id is not among the segments, or a class is not in 1..C.
    """
    return _count(overlap_table(prediction, truth), prediction, truth, num_classes)


def _count(
    overlap: np.ndarray, prediction: Segments, truth: Segments, num_classes: int, background: bool = False
) -> np.ndarray:
    matched = match_segments(overlap, prediction, truth, num_classes, background)
    counts = np.empty((4, num_classes))
    right = truth.classes[matched.rows]
    counts[0] = np.bincount(right - 1, weights=matched.iou, minlength=num_classes)
    parts = (right, prediction.classes[matched.extra], truth.classes[matched.missed])
    for i, classes in enumerate(parts, start=1):
        counts[i] = np.bincount(classes - 1, minlength=num_classes)
    return counts


class Matches(NamedTuple):
    """How the segments of an image match, by the rules of `count_matches`.

    Attributes:
        rows, columns: (M,) indices of the true and the predicted segments that match.
        iou: (M,) their IoU.
        missed: (G,) bool, false negatives.
        extra: (P,) bool, false positives.
    """

    rows: np.ndarray
    columns: np.ndarray
    iou: np.ndarray
    missed: np.ndarray
    extra: np.ndarray


def match_segments(
    overlap: np.ndarray, prediction: Segments, truth: Segments, num_classes: int, background: bool = False
) -> Matches:
    """Matches segments, given their `overlap_table`.

    `background`: pixels outside of all true segments count like any others, instead of as void.
    """
    _check_classes(prediction, num_classes, "the prediction")
    _check_classes(truth, num_classes, "the ground truth")
    true_area, area = overlap.sum(1)[1:], overlap.sum(0)[1:]
    void, shared = overlap[0, 1:] * (not background), overlap[1:, 1:]
    union = area + true_area[:, None] - shared - void
    iou = np.divide(shared, union, out=np.zeros_like(shared), where=shared > 0)
    fits = (truth.classes[:, None] == prediction.classes) & ~truth.crowd[:, None]
    # With an IoU above 0.5, a segment has at most one match.
    row, column = np.nonzero(fits & (iou > 0.5))
    missed, extra = ~truth.crowd, area > 0
    missed[row] = False
    extra[column] = False
    extra &= void + _same_crowd(overlap, prediction, truth, num_classes) <= 0.5 * area
    return Matches(row, column, iou[row, column], missed, extra)


def _same_crowd(overlap: np.ndarray, prediction: Segments, truth: Segments, num_classes: int) -> np.ndarray:
    """(P,) pixels of each predicted segment in the last listed crowd of its class."""
    row_of_class = np.zeros(num_classes + 1, np.int64)
    for k in np.flatnonzero(truth.crowd):
        row_of_class[truth.classes[k]] = k + 1
    rows = row_of_class[prediction.classes]
    return np.where(rows > 0, overlap[rows, np.arange(1, len(rows) + 1)], 0)


def _check_classes(segments: Segments, num_classes: int, what: str) -> None:
    wrong = (segments.classes < 1) | (segments.classes > num_classes)
    if wrong.any():
        raise UserError(f"{what} holds class {segments.classes[wrong][0]}, but the classes are 1..{num_classes}")


def class_figures(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(4, C) counts -> (C,) bool, whether each class occurs, and (3, C) PQ, SQ and RQ in percent; 0 if undefined."""
    iou, tp, fp, fn = counts
    weight = tp + 0.5 * fp + 0.5 * fn
    occurs = weight > 0
    zero = np.zeros((3, counts.shape[1]))
    figures = np.divide([iou, iou, tp], [weight, tp, weight], out=zero, where=np.stack([occurs, tp > 0, occurs]))
    return occurs, 100 * figures


class PanopticMetric(Metric):
    """PQ = SQ * RQ of each class over all images, averaged over the classes that occur; in percent.

    Args:
        protocol: name recorded in the result.
        names: names of the classes 1..C.
        is_thing: whether each of the classes 1..C is a thing.
        background: what lies outside of all true segments is known to be background, as in instance annotations, so
            that predictions there are wrong. By default it is void, unknown, and predictions there are not counted.
    """

    def __init__(
        self, protocol: str, names: Sequence[str], is_thing: Sequence[bool], *, background: bool = False
    ) -> None:
        assert len(names) == len(is_thing), (len(names), len(is_thing))
        self.protocol, self.names, self.background = protocol, list(names), background
        things = np.array(is_thing, bool)
        self.groups = {"": np.ones_like(things), "_things": things, "_stuff": ~things}
        self.counts = np.zeros((4, len(self.names)))
        self.images = np.zeros(1)

    def update(self, prediction: Any, sample: Sample) -> dict[str, float]:
        """Adds one image.

        Args:
            prediction: `Segments` of any size; resized to the truth's size by nearest neighbor.
            sample: `meta["segments"]` is the ground truth, a `Segments` at native size.

        Returns:
            pq: mean over the classes that occur in this image, in percent; 0 if there are none.
            segments_gt: number of listed true segments except crowds.
            segments_pred: number of predicted segments that have pixels after resizing.
        """
        truth: Segments = sample.meta["segments"]
        size = (truth.ids.shape[0], truth.ids.shape[1])
        resized = prediction.at(resize_nearest(prediction.ids, size))
        try:
            overlap = overlap_table(resized, truth)
            counts = _count(overlap, resized, truth, len(self.names), self.background)
        except UserError as error:
            raise UserError(f"{sample.id}: {error}") from error
        self.counts += counts
        self.images += 1
        occurs, (pq, _, _) = class_figures(counts)
        return {
            "pq": float(pq.sum() / max(occurs.sum(), 1)),
            "segments_gt": float((~truth.crowd).sum()),
            "segments_pred": float((overlap.sum(0)[1:] > 0).sum()),
        }

    def state(self) -> dict[str, np.ndarray]:
        return {"counts": self.counts.copy(), "images": self.images.copy()}

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        self.counts, self.images = np.array(state["counts"]), np.array(state["images"])

    def compute(self) -> dict[str, float]:
        """pq, sq, rq (percent) and the number of classes that occur, for all, things and stuff; pq/NAME of each class.

        Things or stuff are left out if no class is of that kind, and are 0 if none of their classes occurs. Raises
        UserError if there was no image.
        """
        if self.images[0] == 0:
            raise UserError("no image was evaluated: use a split with images and a limit of at least 1")
        occurs, figures = class_figures(self.counts)
        result: dict[str, float] = {}
        for group, members in self.groups.items():
            if not members.any():
                continue
            counted = occurs & members
            mean = figures[:, counted].sum(1) / max(counted.sum(), 1)
            result |= {f"{name}{group}": float(value) for name, value in zip(("pq", "sq", "rq"), mean, strict=True)}
            result[f"classes{group or '_all'}"] = float(counted.sum())
        result["images"] = float(self.images[0])
        result |= {f"pq/{self.names[c]}": float(figures[0, c]) for c in np.flatnonzero(occurs)}
        return result
