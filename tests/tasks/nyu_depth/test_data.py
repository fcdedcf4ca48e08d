"""The NYU layouts and own folders are read; broken files get one clear line."""

from __future__ import annotations

import pickle
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from tests.support.small import small_data
from uvim_fsq.commands.data_check import check_data
from uvim_fsq.errors import UserError
from uvim_fsq.synthetic.render import render
from uvim_fsq.tasks.nyu_depth.data import open_source
from uvim_fsq.tasks.nyu_depth.files import read_depth_file
from uvim_fsq.tasks.nyu_depth.task import NYUDepthConfig

CONFIG = NYUDepthConfig(protocol="full")


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "letter"), [("h5", "B"), ("mat", "A"), ("png", "C")])
def test_layouts_are_found_by_content(tmp_path: Path, layout: str, letter: str) -> None:
    root = small_data(tmp_path / "data", num=25, num_val=3, layout=layout)
    train, val = (open_source(str(root), split, CONFIG) for split in ("train", "val"))
    assert train.info["layout"] == letter and (len(train), len(val)) == (25, 3)
    assert val.info["official_count"] == 654 and train.info["ground_truth"] in ("raw", "filled")
    sample = pickle.loads(pickle.dumps(train))[0]
    assert sample.image.shape == (24, 32, 3) and sample.image.dtype == np.uint8
    assert sample.maps["depth"].shape == (24, 32) and sample.maps["depth"].dtype == np.float32
    depths = [render(0, i, (24, 32)).depth for i in range(25)]
    error = min(float(np.abs(d - sample.maps["depth"])[sample.maps["depth"] > 0].max()) for d in depths)
    assert error <= 0.0011  # the PNG tree stores truncated millimeters
    holdout, rest = (open_source(str(root), split, CONFIG) for split in ("holdout", "train_minus_holdout"))
    ids = [{source[i].id for i in range(len(source))} for source in (holdout, rest, train)]
    assert ids[0] and ids[0] | ids[1] == ids[2] and not ids[0] & ids[1]
    lines, ok = check_data("nyu_depth", str(root))
    assert ok and f"layout {letter}" in lines[0] and any("DIFFERS" in line for line in lines)


def test_an_own_folder_is_split_by_position(tmp_path: Path) -> None:
    for kind in ("images", "depth"):
        (tmp_path / kind).mkdir()
    depth = np.linspace(0.5, 9, 12 * 8).reshape(8, 12).astype(np.float32)
    for i in range(11):
        Image.fromarray(np.full((8, 12, 3), i, np.uint8)).save(tmp_path / "images" / f"{i:02d}.jpg")
    for i in range(10):
        np.save(tmp_path / "depth" / f"{i:02d}.npy", depth * 100)
    config = NYUDepthConfig(protocol="full", depth_scale=100)
    with pytest.raises(UserError, match="1 images have no depth map, the first is 10"):
        open_source(str(tmp_path), "train", config)
    np.save(tmp_path / "depth" / "10.npy", depth * 100)
    train, val = (open_source(str(tmp_path), split, config) for split in ("train", "val"))
    assert (len(train), len(val)) == (9, 2)
    np.testing.assert_allclose(train[0].maps["depth"], depth, rtol=1e-6)
    parts = [open_source(str(tmp_path), split, config) for split in ("val", "holdout", "train_minus_holdout")]
    ids = [source[i].id for source in parts for i in range(len(source))]
    assert len(parts[1]) == 1 and len(ids) == len(set(ids)) == 11, "nothing is held out of the evaluation split"


def test_depth_files_become_meters(tmp_path: Path) -> None:
    wide, narrow = tmp_path / "wide.png", tmp_path / "narrow.png"
    Image.fromarray(np.array([[0, 1500], [9999, 2000]], np.uint16)).save(wide)
    Image.fromarray(np.array([[0, 51], [255, 102]], np.uint8)).save(narrow)
    np.testing.assert_allclose(read_depth_file(wide), [[0, 1.5], [9.999, 2]], rtol=1e-6)
    np.testing.assert_allclose(read_depth_file(narrow), [[0, 2], [10, 4]], rtol=1e-6)
    odd = tmp_path / "odd.npy"
    np.save(odd, np.array([[np.nan, -1.0], [np.inf, 2.0]]))
    np.testing.assert_array_equal(read_depth_file(odd), [[0, 0], [0, 2]])
    np.save(odd, np.full((2, 2), 2000.0))
    with pytest.raises(UserError, match="scale"):
        read_depth_file(odd)
    # The median decides; of an even number of values it is the mean of the middle two.
    fit = ([0.01, 0.05, 3000], [0, 0, 0, 99, 99.5], [0.001, 0.05], [0, 0])
    for values in (*fit, [0.01, 0.01, 3], [1, 1, 500, 500]):
        np.save(odd, np.array([values]))
        if values in fit:
            np.testing.assert_array_equal(read_depth_file(odd), np.array([values], np.float32))
        else:
            with pytest.raises(UserError, match="median depth"):
                read_depth_file(odd)
    wide.write_bytes(wide.read_bytes()[:40])
    with pytest.raises(UserError, match="wide.png cannot be read"):
        read_depth_file(wide)


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        open_source(str(tmp_path / "nowhere"), "train", CONFIG)
    with pytest.raises(UserError, match="no depth data found"):
        open_source(str(tmp_path), "train", CONFIG)
    root = small_data(tmp_path / "data", num=4, num_val=2)
    source = open_source(str(root), "train", CONFIG)
    files = sorted(root.rglob("train/**/*.h5"))
    files[0].write_bytes(files[0].read_bytes()[:500])
    with h5py.File(files[1], "a") as file:
        del file["depth"]
    with pytest.raises(UserError, match=files[0].name):
        source[0]
    with pytest.raises(UserError, match="no dataset 'depth'"):
        source[1]
    lines, ok = check_data("nyu_depth", str(root))
    assert not ok and any(files[0].name in line for line in lines)
    with pytest.raises(UserError, match="unknown split"):
        open_source(str(root), "validation", CONFIG)
