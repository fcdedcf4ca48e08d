"""Maps of vectors follow crops, resizes and flips."""

from __future__ import annotations

import numpy as np
import pytest

from examples.camvid_segmentation.camvid_segmentation import CamvidSegmentation, Config
from uvim_fsq.config.schema import DataConfig
from uvim_fsq.data.sample import Sample
from uvim_fsq.data.transforms import JointTransform


class Flow(CamvidSegmentation):
    """Its maps are a flow, and the row and column of the pixel each value came from."""

    def adjust(
        self, maps: dict[str, np.ndarray], scale: tuple[float, float], *, mirrored: bool
    ) -> dict[str, np.ndarray]:
        factor = np.array([-scale[1] if mirrored else scale[1], scale[0]], np.float32)
        return {**maps, "flow": maps["flow"] * factor}


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("crop", ["none", "inception"])
def test_vectors_follow_their_pixels(crop: str, linear: bool) -> None:
    """A flip must also negate the vectors, and a resize must scale them."""
    rows, columns = np.mgrid[:48, :64].astype(np.float32)
    flow = np.stack([np.full((48, 64), 3.0), np.full((48, 64), 5.0)], -1).astype(np.float32)
    sample = Sample("x", np.zeros((48, 64, 3), np.uint8), {"flow": flow, "columns": columns, "rows": rows})
    Flow.linear_maps = ("flow",) if linear else ()
    transform = JointTransform(DataConfig(image_size=16, crop=crop, hflip=True), Flow(Config()), train=True)
    seen = set()
    for seed in range(12):
        maps = transform.resample(sample, seed).maps
        across = (maps["columns"][0, -1] - maps["columns"][0, 0]) / 15  # old pixels per new one; negative if mirrored
        down = (maps["rows"][-1, 0] - maps["rows"][0, 0]) / 15
        np.testing.assert_allclose(maps["flow"][8, 8, 0] * across, 3, rtol=0.15)
        np.testing.assert_allclose(maps["flow"][8, 8, 1] * down, 5, rtol=0.15)
        seen.add(bool(across < 0))
    assert seen == {False, True} and float(flow[0, 0, 0]) == 3
    whole = JointTransform(DataConfig(image_size=16), Flow(Config()), train=False).resample(sample, 0).maps["flow"]
    np.testing.assert_allclose(whole, np.broadcast_to(np.float32([3 / 4, 5 / 3]), (16, 16, 2)), rtol=1e-5)


def test_a_picture_to_predict_has_no_maps_to_correct() -> None:
    transform = JointTransform(DataConfig(image_size=16), Flow(Config()), train=False)
    assert transform.picture(np.zeros((48, 64, 3), np.uint8)).shape == (3, 16, 16)
