"""Depth labels, protocol crops and decoding."""

from __future__ import annotations

import numpy as np
import pytest

from uvim_fsq.data.sample import Sample
from uvim_fsq.errors import UserError
from uvim_fsq.tasks.nyu_depth.task import NYUDepth, NYUDepthConfig


def sample_of(depth: np.ndarray) -> Sample:
    return Sample("x", np.zeros((*depth.shape, 3), np.uint8), {"depth": depth.astype(np.float32)})


def test_each_protocol_crops_its_own_region() -> None:
    depth = np.arange(480 * 640, dtype=np.float32).reshape(480, 640)
    for protocol, first in (("uvim", 54), ("eigen", 45)):
        view = NYUDepth(NYUDepthConfig(protocol=protocol)).evaluation_view(sample_of(depth))
        assert view.maps["depth"].shape == (426, 560) == view.image.shape[:2]
        assert view.maps["depth"][0, 0] == first * 640 + 41
    with pytest.raises(UserError, match="task.protocol=full"):
        NYUDepth(NYUDepthConfig()).evaluation_view(sample_of(np.ones((24, 32))))


def test_bins_are_uniform_in_depth() -> None:
    depth = np.random.default_rng(0).uniform(-0.1, 12, (64, 64)).astype(np.float32)
    for bins, missing, kind in ((256, "bin0", "uint8"), (256, "void", "int16"), (99, "void", "int8")):
        config = NYUDepthConfig(num_bins=bins, missing=missing)
        share = (depth - config.min_depth) / (config.max_depth - config.min_depth)
        expected = np.floor(share * bins).clip(0, bins - 1).astype(np.int64)
        if missing == "void":
            expected[depth <= config.min_depth] = -1
        labels = NYUDepth(config).encode(sample_of(depth))["depth"]
        np.testing.assert_array_equal(labels, expected)
        assert labels.dtype == kind


def test_missing_depth_and_decoding() -> None:
    import torch

    depth = np.array([[0.0, 5.0]])
    assert NYUDepth(NYUDepthConfig()).encode(sample_of(depth))["depth"].tolist() == [[0, 127]]
    assert NYUDepth(NYUDepthConfig(missing="void")).encode(sample_of(depth))["depth"].tolist() == [[-1, 127]]
    logits = {"depth": torch.log(torch.tensor([[[[0.5, 0.25, 0.25, 0.0]]]]))}
    small = {"num_bins": 4, "min_depth": 0.0, "max_depth": 4.0}
    assert float(NYUDepth(NYUDepthConfig(**small)).decode(logits)[0]) == 0.5
    assert abs(float(NYUDepth(NYUDepthConfig(**small, decoding="expectation")).decode(logits)[0]) - 1.25) < 1e-6
