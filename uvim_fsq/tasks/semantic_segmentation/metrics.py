"""Intersection over union from one confusion matrix of all pixels (Everingham et al., Pascal VOC, IJCV 2010)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import cv2
import numpy as np

from uvim_fsq.data.resize import resize_nearest
from uvim_fsq.data.sample import Sample
from uvim_fsq.errors import UserError
from uvim_fsq.tasks.base import Matrix, Metric


def class_map(prediction: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A prediction at another size: (height, width) class indices.

    Args:
        prediction: (S, S) class indices, resized by nearest neighbor; or (S, S, C) probabilities, resized bilinearly
            before the most likely class is taken.
        size: (height, width).
    """
    if prediction.ndim == 2:
        return resize_nearest(prediction, size)
    planes = (np.ascontiguousarray(prediction[..., c]) for c in range(prediction.shape[2]))
    return most_likely((cv2.resize(p, (size[1], size[0]), interpolation=cv2.INTER_LINEAR) for p in planes), size)


def most_likely(shares: Iterable[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """(height, width) int32 indices of the largest share; `shares` are (height, width) float32, one for each class.

    They are taken one at a time: all of them at the size of a large photo may not fit in memory.
    """
    best = np.full(size, -np.inf, np.float32)
    found = np.zeros(size, np.int32)
    for c, share in enumerate(shares):
        better = share > best
        best[better] = share[better]
        found[better] = c
    return found


class SegmentationMetric(Metric):
    """IoU of each class over the labeled pixels of all images at their own size, and its mean over the classes that
    occur in the truth or the predictions; in percent.
    """

    def __init__(self, protocol: str, names: Sequence[str]) -> None:
        self.protocol, self.names = protocol, list(names)
        #: (C, C) pixels by true class (row) and predicted class (column).
        self.confusion = np.zeros((len(self.names), len(self.names)))
        # images, images without a labeled pixel
        self.counts = np.zeros(2)

    def update(self, prediction: Any, sample: Sample) -> dict[str, float]:
        """Adds one image.

        Args:
            prediction: as for `class_map`.
            sample: `maps["classes"]` is the ground truth, (H, W) with -1 for no label.

        Returns:
            miou: over the classes that occur in this image, in percent.
            pixel_accuracy: share of right pixels, in percent.
            labeled_pixels: their number; without any, the other two are left out.
        """
        truth = sample.maps["classes"]
        predicted = class_map(prediction, (truth.shape[0], truth.shape[1]))
        labeled = truth >= 0
        pairs = truth[labeled].astype(np.int64) * len(self.names) + predicted[labeled]
        confusion = np.bincount(pairs, minlength=self.confusion.size).reshape(self.confusion.shape)
        self.confusion += confusion
        self.counts += [1, len(pairs) == 0]
        row = {"labeled_pixels": float(len(pairs))}
        if len(pairs):
            iou, occurs = class_iou(confusion)
            right = float(np.trace(confusion) / len(pairs))
            row = {"miou": float(100 * iou[occurs].mean()), "pixel_accuracy": 100 * right, **row}
        return row

    def state(self) -> dict[str, np.ndarray]:
        return {"confusion": self.confusion.copy(), "counts": self.counts.copy()}

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        self.confusion, self.counts = np.array(state["confusion"]), np.array(state["counts"])

    def compute(self) -> dict[str, float]:
        """miou, pixel_accuracy, mean_accuracy (recall, averaged over the classes of the truth) and iou/NAME of each
        class that occurs, in percent; the number of these classes and of images.
        """
        total = self.confusion.sum()
        if not total:
            raise UserError(f"no labeled pixel was evaluated, in {int(self.counts[0])} images")
        iou, occurs = class_iou(self.confusion)
        true = self.confusion.sum(1)
        recall = np.diag(self.confusion)[true > 0] / true[true > 0]
        return {
            "miou": float(100 * iou[occurs].mean()),
            "pixel_accuracy": float(100 * np.trace(self.confusion) / total),
            "mean_accuracy": float(100 * recall.mean()),
            "classes": float(occurs.sum()),
            "images": float(self.counts[0]),
            "images_unlabeled": float(self.counts[1]),
            **{f"iou/{self.names[c]}": float(100 * iou[c]) for c in np.flatnonzero(occurs)},
        }

    def matrices(self) -> dict[str, Matrix]:
        """The confusion matrix: pixels by true class (row) and predicted class (column)."""
        return {"confusion": Matrix(self.names, self.names, self.confusion)}


def class_iou(confusion: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(C, C) pixel counts -> (C,) IoU, 0 where undefined, and (C,) bool: whether the class occurs at all."""
    right = np.diag(confusion)
    union = confusion.sum(0) + confusion.sum(1) - right
    return np.divide(right, union, out=np.zeros(len(right)), where=union > 0), union > 0
