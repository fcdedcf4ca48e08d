"""Damaged HDF5 files of depth data are detected."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from tests.support.damage import damaged
from tests.support.small import small_data
from uvim_fsq.errors import UserError
from uvim_fsq.tasks.nyu_depth.data import open_source, prepare
from uvim_fsq.tasks.nyu_depth.files import read_depth_file
from uvim_fsq.tasks.nyu_depth.task import NYUDepthConfig

CONFIG = NYUDepthConfig(protocol="full")


def test_damaged_prepared_files_are_detected(tmp_path: Path) -> None:
    root = small_data(tmp_path / "data", num=3, num_val=1, layout="png")
    prepare(str(root), CONFIG, lambda done, total: None)
    source = open_source(str(root), "train", CONFIG)
    file, truth, rng = source.pairs[0][1], source[0], np.random.default_rng(0)
    assert file.suffix == ".h5"
    whole = file.read_bytes()
    for _ in range(200):
        broken = damaged(whole, rng)
        if broken == whole:
            continue
        file.write_bytes(broken)
        with pytest.raises(UserError, match="is damaged .*run `uvim-fsq data prepare` again|expected uint8") as caught:
            source[0]
        assert str(file) in str(caught.value) and "\n" not in str(caught.value)
    file.write_bytes(whole)
    np.testing.assert_array_equal(source[0].maps["depth"], truth.maps["depth"])
    (root / "prepared_depth/contents.json").write_text('{"a": [')
    with pytest.raises(UserError, match="contents.json is damaged .*delete"):
        open_source(str(root), "train", CONFIG)


@pytest.mark.parametrize("mode", ["P", "1", "LA", "RGB"])
def test_pictures_that_do_not_hold_gray_values_are_no_depth_maps(tmp_path: Path, mode: str) -> None:
    """The numbers of a palette have no order, and one bit is no depth."""
    Image.fromarray(np.full((4, 6), 100, np.uint8)).convert(mode).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"a.png cannot be read as a depth map \(its pixels are of kind"):
        read_depth_file(tmp_path / "a.png")


def test_a_chunk_larger_than_its_image_is_never_unpacked(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        chunked = {"maxshape": (None, None), "chunks": (20_000, 20_000), "compression": "gzip"}
        file.create_dataset("depth", shape=(24, 32), dtype="f4", **chunked)
    with pytest.raises(UserError, match="dataset 'depth' has 20000 x 20000, 400 million pixels"):
        read_depth_file(tmp_path / "a.h5")
