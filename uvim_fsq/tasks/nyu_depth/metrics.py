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


class DepthMetric(Metric):
    """Per-image metrics averaged over images (not pooled over pixels), and the RMSE pooled over all pixels.

    A pixel is valid if min_depth < truth < max_depth (meters). Predictions are resized to the truth's size by nearest
    neighbor and clamped to [min_depth, max_depth]. Infinity becomes max_depth and NaN min_depth, and such images are
    counted. Images without valid pixels are skipped and counted.
    """

    def __init__(self, protocol: str, min_depth: float = 1e-3, max_depth: float = 10.0) -> None:
        self.protocol, self.min_depth, self.max_depth = protocol, min_depth, max_depth
        self.sums = np.zeros(len(FIGURES))
        # images, skipped images, images with a repaired prediction, squared error, valid pixels
        self.counts = np.zeros(5)

    def update(self, prediction: Any, sample: Sample) -> dict[str, float]:
        truth = sample.maps["depth"]
        valid = (truth > self.min_depth) & (truth < self.max_depth)
        if not valid.any():
            self.counts[1] += 1
            return {"valid_pixels": 0.0}
        resized = resize_nearest(np.asarray(prediction, np.float64), (truth.shape[0], truth.shape[1]))
        self.counts[2] += not bool(np.isfinite(resized[valid]).all())
        resized = np.nan_to_num(resized, nan=self.min_depth, posinf=self.max_depth, neginf=self.min_depth)
        resized = resized.clip(self.min_depth, self.max_depth)
        figures = depth_figures(resized, truth, valid)
        self.sums += [figures[name] for name in FIGURES]
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
            **{name: float(value / images) for name, value in zip(FIGURES, self.sums, strict=True)},
            "rmse_pooled": float(np.sqrt(squared / pixels)),
            "images": float(images),
            "images_skipped": float(skipped),
            "images_repaired": float(repaired),
        }
