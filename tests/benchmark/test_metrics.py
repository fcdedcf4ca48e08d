"""Timings of the metrics."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.support.benchmark import by_name, without
from uvim_fsq.benchmark import metrics
from uvim_fsq.synthetic.render import render


def test_every_metric_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "panopticapi")
    lines = by_name(metrics.measure_metrics(repeats=1, images=2, features=40, dim=8))
    assert list(lines) == [
        "PQ per image, ours",
        "PQ per image from PNGs, ours",
        "depth metrics per image",
        "FID moments of 2 x 40 x 8",
        "FID distance of 2 x 40 x 8, ours",
        "FID distance of 2 x 40 x 8, scipy's sqrtm",
    ]
    panoptic = lines["PQ per image, ours"].other
    assert panoptic["panopticapi"].startswith("not installed: pip install git+")
    assert 50 < panoptic["pq"] < 95 and panoptic["pq"] == lines["PQ per image from PNGs, ours"].other["pq"]
    assert lines["depth metrics per image"].other["abs_rel"] == pytest.approx(0.05, abs=0.002)
    fid = lines["FID distance of 2 x 40 x 8, ours"].other
    assert fid["fid"] > 0 and fid["relative difference"] < 1e-9
    theirs = lines["FID distance of 2 x 40 x 8, scipy's sqrtm"]
    ratio = theirs.value / lines["FID distance of 2 x 40 x 8, ours"].value
    assert theirs.other["time / ours"] == pytest.approx(ratio)


def test_sqrtm_distance_of_known_sets() -> None:
    features = metrics.synthetic_features(60, 5, 0)
    a, b = metrics.moments_of(features), metrics.moments_of(features + np.arange(5))
    # Equal covariances: the squared distance of the means is left.
    assert metrics.sqrtm_distance(a, b) == pytest.approx(30, rel=1e-9)
    assert a.count == 60 and np.allclose(a.covariance, np.cov(features.T))


def test_the_panoptic_images_have_true_and_predicted_segments(tmp_path: Path) -> None:
    rooms = [render(0, index, metrics.SIZE).segments for index in range(2)]
    case = metrics.PanopticCase(rooms, tmp_path)
    assert case.ours(True) == case.ours(False)
    truth, prediction = case.pairs[1]
    assert len(truth.segment_ids) == len(np.unique(rooms[1])) - (0 in rooms[1])
    assert truth.segment_ids.max() > 1 << 16
    np.testing.assert_array_equal(case._read("1_truth.png"), truth.ids)
    np.testing.assert_array_equal(case._read("1_predicted.png"), prediction.ids)
    assert sum(info["area"] for info in case.annotations[1][0]["segments_info"]) == (truth.ids > 0).sum()
    case.pairs = [(truth, truth) for truth, _ in case.pairs]
    assert case.ours(False) == {"pq": 100.0, "sq": 100.0, "rq": 100.0}


def test_panopticapi_gives_our_figures(tmp_path: Path) -> None:
    pytest.importorskip("panopticapi")
    lines = by_name(metrics.measure_panoptic([render(0, index, metrics.SIZE).segments for index in range(3)], 1))
    for name in ("PQ per image", "PQ per image from PNGs"):
        assert lines[f"{name}, ours"].other["largest difference of pq, sq, rq"] < 1e-9
        assert lines[f"{name}, panopticapi"].other["time / ours"] > 0
