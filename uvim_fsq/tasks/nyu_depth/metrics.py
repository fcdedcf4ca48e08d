"""The six depth metrics (Eigen et al., arXiv 1406.2283; UViM's NYU evaluator): per image, then averaged over images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from uvim_fsq.data.resize import resize_nearest
from uvim_fsq.data.sample import Sample
from uvim_fsq.errors import UserError
from uvim_fsq.tasks.base import Metric

FIGURES = ("rmse", "abs_rel", "log10", "delta1", "delta2", "delta3")
#: What results on KITTI have in addition: squared error relative to depth (meters), RMSE of the natural logarithm, and
#: its scale-invariant form times 100.
KITTI_FIGURES = (*FIGURES, "sq_rel", "rmse_log", "silog")
#: Scored part of a picture: (first row, end row, first column, end column) as shares of its height and width.
Region = tuple[float, float, float, float]


def depth_figures(prediction: np.ndarray, truth: np.ndarray, valid: np.ndarray) -> dict[str, float]:
    """The metrics of one image over its valid pixels; RMSE in meters.

    Args:
        prediction: (H, W) meters, finite and positive where valid.
        truth: (H, W) meters.
        valid: (H, W) bool, at least one True.
    """
    p, t = prediction[valid].astype(np.float64), truth[valid].astype(np.float64)
    ratio = np.maximum(p / t, t / p)
    return {
        "rmse": float(np.sqrt(np.mean((p - t) ** 2))),
        "abs_rel": float(np.mean(np.abs(p - t) / t)),
        "log10": float(np.mean(np.abs(np.log10(p) - np.log10(t)))),
        **{f"delta{i}": float(np.mean(ratio < 1.25**i)) for i in (1, 2, 3)},
    }


def logarithmic_figures(prediction: np.ndarray, truth: np.ndarray, valid: np.ndarray) -> dict[str, float]:
    """The further metrics of `KITTI_FIGURES` of one image; arguments as for `depth_figures`."""
    p, t = prediction[valid].astype(np.float64), truth[valid].astype(np.float64)
    error = np.log(p) - np.log(t)
    variance = max(float(np.mean(error**2) - np.mean(error) ** 2), 0.0)
    return {
        "sq_rel": float(np.mean((p - t) ** 2 / t)),
        "rmse_log": float(np.sqrt(np.mean(error**2))),
        "silog": 100 * variance**0.5,
    }


def inside_region(size: tuple[int, int], region: Region) -> np.ndarray:
    """(H, W) bool, True inside."""
    height, width = size
    inside = np.zeros(size, bool)
    rows = slice(int(region[0] * height), int(region[1] * height))
    inside[rows, int(region[2] * width) : int(region[3] * width)] = True
    return inside


class DepthMetric(Metric):
    """Per-image metrics averaged over images (not pooled over pixels), and the RMSE pooled over all pixels.

    A pixel is valid if min_depth < truth < max_depth (meters). Predictions are resized to the truth's size by nearest
    neighbor and clamped to [min_depth, max_depth]. Infinity becomes max_depth and NaN min_depth, and such images are
    counted. Images without valid pixels are skipped and counted.

    With a `region` (KITTI), only pixels inside of it count, and the figures are `KITTI_FIGURES`.
    """

    def __init__(
        self, protocol: str, min_depth: float = 1e-3, max_depth: float = 10.0, region: Region | None = None
    ) -> None:
        self.protocol, self.min_depth, self.max_depth, self.region = protocol, min_depth, max_depth, region
        self.names = FIGURES if region is None else KITTI_FIGURES
        self.sums = np.zeros(len(self.names))
        # images, skipped images, images with a repaired prediction, squared error, valid pixels
        self.counts = np.zeros(5)

    def valid(self, truth: np.ndarray) -> np.ndarray:
        """(H, W) bool, the pixels of a true map (H, W) that count."""
        valid = (truth > self.min_depth) & (truth < self.max_depth)
        if self.region is not None:
            valid &= inside_region((truth.shape[0], truth.shape[1]), self.region)
        return valid

    def update(self, prediction: Any, sample: Sample) -> dict[str, float]:
        truth = sample.maps["depth"]
        valid = self.valid(truth)
        if not valid.any():
            self.counts[1] += 1
            return {"valid_pixels": 0.0}
        resized = resize_nearest(np.asarray(prediction, np.float64), (truth.shape[0], truth.shape[1]))
        self.counts[2] += not bool(np.isfinite(resized[valid]).all())
        resized = np.nan_to_num(resized, nan=self.min_depth, posinf=self.max_depth, neginf=self.min_depth)
        resized = resized.clip(self.min_depth, self.max_depth)
        figures = depth_figures(resized, truth, valid)
        if self.region is not None:
            figures |= logarithmic_figures(resized, truth, valid)
        self.sums += [figures[name] for name in self.names]
        squared = float(((resized - truth)[valid].astype(np.float64) ** 2).sum())
        self.counts += [1, 0, 0, squared, valid.sum()]
        return {**figures, "valid_pixels": float(valid.sum())}

    def state(self) -> dict[str, np.ndarray]:
        return {"sums": self.sums.copy(), "counts": self.counts.copy()}

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        self.sums, self.counts = np.array(state["sums"]), np.array(state["counts"])

    def compute(self) -> dict[str, float]:
        images, skipped, repaired, squared, pixels = self.counts
        if images == 0:
            raise UserError(f"no image with a valid depth pixel was evaluated ({int(skipped)} skipped)")
        return {
            **{name: float(value / images) for name, value in zip(self.names, self.sums, strict=True)},
            "rmse_pooled": float(np.sqrt(squared / pixels)),
            "images": float(images),
            "images_skipped": float(skipped),
            "images_repaired": float(repaired),
        }
