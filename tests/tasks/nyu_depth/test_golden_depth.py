"""Depth: bins, loss, decoding, metrics and nearest resizing equal the reference's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.support.golden import golden
from uvim_fsq.data.resize import resize_nearest
from uvim_fsq.data.sample import Sample
from uvim_fsq.layers import patchify, unpatchify
from uvim_fsq.tasks.nyu_depth.metrics import FIGURES, DepthMetric
from uvim_fsq.tasks.nyu_depth.task import NYUDepth, NYUDepthConfig


def test_bins_loss_and_decoding_equal_the_references() -> None:
    arrays, task = golden("pipeline.npz"), NYUDepth(NYUDepthConfig())
    depth, bins = arrays["depth/labels"][..., 0], arrays["depth/bins"]
    image = np.zeros((16, 24, 3), np.uint8)
    encoded = np.stack([task.encode(Sample("x", image, {"depth": d}))["depth"] for d in depth])
    np.testing.assert_array_equal(patchify(torch.tensor(encoded), 8).numpy(), bins)
    logits = torch.tensor(arrays["depth/logits"]).transpose(2, 3)  # (B, patches, pixels, bins)
    loss, _ = task.loss({"depth": logits.flatten(1, 2)}, {"depth": torch.tensor(bins).flatten(1, 2)})
    np.testing.assert_allclose(loss.mean().item(), arrays["depth/mean_loss"], atol=1e-5)
    np.testing.assert_allclose(loss.numpy(), arrays["depth/loss"].mean((1, 2)), atol=1e-5)
    patches = [task.decode({"depth": unpatchify(logits[:, i : i + 1], 8)}) for i in range(6)]
    expected = patchify(torch.tensor(arrays["depth/pred"]), 8)
    for i, items in enumerate(patches):
        np.testing.assert_allclose(np.stack(items).reshape(2, 64), expected[:, i].numpy(), atol=1e-5)


def test_metrics_equal_the_references() -> None:
    arrays = golden("pipeline.npz")
    metric = DepthMetric("nyu_depth/uvim")
    truth = arrays["nyu/gt_f16"][0].astype(np.float32)
    row = metric.update(arrays["nyu/pred_64"][0], Sample("x", np.zeros((426, 560, 3), np.uint8), {"depth": truth}))
    names = {"RMSE": "rmse", "abs_RE": "abs_rel"}
    expected = {
        names.get(str(n), str(n)): v for n, v in zip(arrays["nyu/names"], arrays["nyu/per_image"][0], strict=True)
    }
    for name in FIGURES:
        np.testing.assert_allclose(row[name], expected[name], atol=1e-5)
        np.testing.assert_allclose(metric.compute()[name], expected[name], atol=1e-5)


@pytest.mark.parametrize("size", [(13, 11), (5, 3)])
def test_nearest_resizing_equals_the_references(size: tuple[int, int]) -> None:
    arrays = golden("pipeline.npz")
    ours = resize_nearest(arrays["resize/in"][0], size)
    np.testing.assert_allclose(ours, arrays[f"resize/nearest_{size[0]}x{size[1]}"][0])
