"""Errors by true depth, for reports."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from uvim_fsq.data.resize import resize_nearest
from uvim_fsq.data.sample import Sample
from uvim_fsq.tasks.base import Breakdown, Matrix
from uvim_fsq.tasks.nyu_depth.metrics import DepthMetric

#: Ranges of depth.
BINS = 10


class ErrorByDepth(Breakdown):
    """RMSE, mean signed error (meters) and relative error of the pixels in each tenth of the depth range.

    The pixels of all images are pooled, whereas the metrics of the protocol are means over images.

    Args:
        metric: says which pixels count, and clamps predictions.
        max_depth: end of the last range, in meters; the first begins at 0. Deeper pixels are in the last one.
    """

    def __init__(self, metric: DepthMetric, max_depth: float) -> None:
        self.metric, self.edges = metric, np.linspace(0, max_depth, BINS + 1)
        # pixels, squared error, error, relative error
        self.sums = np.zeros((BINS, 4))

    def update(self, prediction: Any, sample: Sample) -> None:
        depth = sample.maps["depth"]
        valid = self.metric.valid(depth)
        truth = depth[valid].astype(np.float64)
        low, high = self.metric.min_depth, self.metric.max_depth
        resized = resize_nearest(np.asarray(prediction, np.float64), (depth.shape[0], depth.shape[1]))[valid]
        error = np.nan_to_num(resized, nan=low, posinf=high, neginf=low).clip(low, high) - truth
        bins = np.minimum(truth / self.edges[1], BINS - 1).astype(np.int64)
        parts = (np.ones_like(error), error**2, error, np.abs(error) / truth)
        self.sums += np.stack([np.bincount(bins, part, BINS) for part in parts], 1)

    def state(self) -> dict[str, np.ndarray]:
        return {"sums": self.sums.copy()}

    def tables(self, state: Mapping[str, np.ndarray]) -> dict[str, Matrix]:
        pixels, squared, error, relative = state["sums"].T
        with np.errstate(invalid="ignore"):
            columns = [(squared / pixels) ** 0.5, error / pixels, relative / pixels, pixels / pixels.sum()]
        rows = [f"{low:.3g} to {high:.3g} m" for low, high in zip(self.edges[:-1], self.edges[1:], strict=True)]
        names = ("RMSE in m", "mean error in m", "relative error", "share of pixels")
        return {"Error by depth": Matrix(rows, names, np.stack(columns, 1))}
