"""Depth metrics against values computed by hand."""

from __future__ import annotations

import numpy as np
import pytest

from uvim_fsq.data.sample import Sample
from uvim_fsq.errors import UserError
from uvim_fsq.tasks.nyu_depth.metrics import FIGURES, DepthMetric


def sample_of(depth: np.ndarray) -> Sample:
    return Sample("x", np.zeros((*depth.shape, 3), np.uint8), {"depth": depth.astype(np.float32)})


def test_metrics_equal_values_computed_by_hand() -> None:
    """Only depths strictly between the limits are valid; a ratio of exactly 1.25 does not count for delta1."""
    metric = DepthMetric("nyu_depth/full")
    truth = np.array([[1e-3, 1.1e-3, 1.0], [4.0, 2.0, 10.0]], np.float32)
    row = metric.update(np.array([[5.0, 0.0, 1.6], [5.0, 2.0, 1.0]]), sample_of(truth))
    ratios, errors = [1.1, 1.6, 1.25, 1.0], np.array([1e-4, 0.6, 1.0, 0.0])  # 0 is clipped to the smallest depth, 1e-3
    first = {
        "rmse": np.sqrt(np.mean(errors**2)),
        "abs_rel": (1e-4 / 1.1e-3 + 0.6 + 0.25) / 4,
        "log10": np.log10(ratios).sum() / 4,
        **{"delta1": 0.5, "delta2": 0.75, "delta3": 1.0},
    }
    assert row == pytest.approx({**first, "valid_pixels": 4}, abs=1e-6)
    flat = np.full((1, 2), 2.0)
    row = metric.update(np.array([[4.0]]), sample_of(flat))  # resized
    second = {"rmse": 2, "abs_rel": 1, "log10": np.log10(2), "delta1": 0, "delta2": 0, "delta3": 0}
    assert row == pytest.approx({**second, "valid_pixels": 2})
    assert metric.update(np.ones((2, 2)), sample_of(np.array([[0.0, 10.0], [1e-3, 11.0]]))) == {"valid_pixels": 0}
    counts = {"images": 2, "images_skipped": 1, "images_repaired": 0}
    pooled = np.sqrt((np.sum(errors**2) + 2 * 4) / 6)
    expected = {name: (first[name] + second[name]) / 2 for name in FIGURES}
    assert metric.compute() == pytest.approx({**expected, "rmse_pooled": pooled, **counts}, abs=1e-6)


def test_non_finite_predictions_are_repaired_and_counted() -> None:
    """Infinity becomes the largest depth, NaN the smallest; pixels that are not valid are ignored."""
    metric = DepthMetric("p", 0.5, 8.0)
    truth = np.array([[0.0, 2.0, 4.0, 6.0]])
    for given, shown in (
        ([np.nan, 2, 4, 6], [2, 4, 6]),
        ([1, np.inf, -np.inf, np.nan], [8, 0.5, 0.5]),
        ([1, 9, 0, np.inf], [8, 0.5, 8]),
    ):
        row = metric.update(np.array([given]), sample_of(truth))
        assert row["rmse"] == pytest.approx(np.sqrt(np.mean((np.array(shown) - [2, 4, 6]) ** 2)))
    figures = metric.compute()
    assert (figures["images"], figures["images_skipped"], figures["images_repaired"]) == (3, 0, 2)


def test_metric_states_of_several_processes_add_up() -> None:
    whole, parts = DepthMetric("p"), [DepthMetric("p"), DepthMetric("p")]
    for i in range(5):
        prediction, truth = np.random.default_rng(i).uniform(0.5, 11, (2, 3, 4 + i))
        for metric in (whole, parts[i % 2]):
            metric.update(prediction, sample_of(truth))
    state = parts[0].state()
    parts[0].update(prediction, sample_of(truth))
    merged = DepthMetric("p")
    merged.load_state({key: value + parts[1].state()[key] for key, value in state.items()})
    assert merged.compute() == pytest.approx(whole.compute()) and merged.compute()["images"] == 5
    empty = DepthMetric("p")
    empty.update(np.ones((1, 1)), sample_of(np.zeros((1, 1))))
    with pytest.raises(UserError, match=r"no image with a valid depth pixel was evaluated \(1 skipped\)"):
        empty.compute()
