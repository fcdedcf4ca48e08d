"""Errors by true depth."""

from __future__ import annotations

import numpy as np
import pytest

from uvim_fsq.data.sample import Sample
from uvim_fsq.tasks.nyu_depth.breakdown import BINS, ErrorByDepth
from uvim_fsq.tasks.nyu_depth.metrics import DepthMetric


def test_errors_are_those_of_the_pixels_in_each_range() -> None:
    truth = np.array([[0.5, 0.5, 9.9], [0.0, 4.0, 11.0]], np.float32)
    prediction = np.array([[1.5, 0.5, np.nan], [3.0, 3.0, 3.0]], np.float32)
    sample = Sample("a", np.zeros((2, 3, 3), np.uint8), {"depth": truth})
    found = ErrorByDepth(DepthMetric("p", 1e-3, 10), 10)
    found.update(prediction, sample)
    (matrix,) = found.tables(found.state()).values()
    values = dict(zip(matrix.rows, matrix.values.tolist(), strict=True))
    assert len(values) == BINS
    assert values["0 to 1 m"] == pytest.approx([0.5**0.5, 0.5, 1.0, 0.5])
    assert values["4 to 5 m"] == pytest.approx([1, -1, 0.25, 0.25])
    assert values["9 to 10 m"] == pytest.approx([9.899, -9.899, 0.9999, 0.25], rel=1e-4)
    assert np.isnan(values["1 to 2 m"][:3]).all() and values["1 to 2 m"][3] == 0
