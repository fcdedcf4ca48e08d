"""Depth files that claim, or unpack to, far more than they hold are refused before memory is allocated."""

from __future__ import annotations

import struct
from pathlib import Path

import h5py
import numpy as np
import pytest

from tests.support.decompression import claim, peak
from uvim_fsq.data.images import limit_pixels
from uvim_fsq.errors import UserError
from uvim_fsq.tasks.nyu_depth.data import LabeledMat
from uvim_fsq.tasks.nyu_depth.files import PairSource, read_depth_file

pytestmark = pytest.mark.usefixtures("default_pixel_limit")


def test_npy_headers_are_checked_before_reading(tmp_path: Path) -> None:
    file = tmp_path / "a.npy"
    for shape in ((60_000, 60_000), (1 << 31, 1 << 31), (1 << 62, 8)):
        file.write_bytes(claim(shape) + b"\0" * 64)
        assert peak(lambda: read_depth_file(file)) < 1
        with pytest.raises(UserError, match="declares an array float32"):
            read_depth_file(file)
    file.write_bytes(claim((2, 8)) + b"\0" * 63)
    with pytest.raises(UserError, match="of 64 bytes but holds 63"):
        read_depth_file(file)
    file.write_bytes(claim((2, 8)) + struct.pack("<16f", *[2.0] * 16))
    assert read_depth_file(file).shape == (2, 8)
    np.save(file, np.array([{}], object))
    with pytest.raises(UserError, match="holds Python objects, not real numbers"):
        read_depth_file(file)
    file.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", 60_000) + b"(" * 60_000)
    with pytest.raises(UserError, match="cannot be read as a depth map"):
        read_depth_file(file)
    limit_pixels(15)
    file.write_bytes(claim((2, 8)) + struct.pack("<16f", *[2.0] * 16))
    with pytest.raises(UserError, match="8 x 2"):
        read_depth_file(file)


def test_hdf5_datasets_are_checked_before_reading(tmp_path: Path) -> None:
    file = tmp_path / "a.h5"

    def write(rgb: tuple[int, ...], depth: tuple[int, ...], dtype: object = np.float32) -> None:
        with h5py.File(file, "w") as handle:
            # Chunks that were never written take no space in the file.
            handle.create_dataset("rgb", rgb, np.uint8, chunks=True)
            handle.create_dataset("depth", depth, dtype, chunks=True)

    source = PairSource(tmp_path, [("a", file, file)], {})
    write((3, 50_000, 50_000), (50_000, 50_000))
    assert file.stat().st_size < 100_000
    assert peak(lambda: source[0]) < 5 and peak(lambda: read_depth_file(file)) < 5
    with pytest.raises(UserError, match="50000 x 50000, 2500 million pixels"):
        source[0]
    for rgb, depth, dtype in (
        ((1 << 30, 20, 20), (20, 20), np.float32),
        ((3, 20, 20), (1 << 30, 20, 20), np.float32),
        ((3, 20, 20), (20, 20), h5py.string_dtype()),
    ):
        write(rgb, depth, dtype)
        assert peak(lambda: source[0]) < 5
    write((3, 20, 20), (20, 20))
    (tmp_path / "other.h5").write_bytes(file.read_bytes())
    with h5py.File(file, "a") as handle:
        del handle["depth"]
        handle["depth"] = h5py.ExternalLink("other.h5", "/depth")
    with pytest.raises(UserError, match="is stored in another file"):
        source[0]
    with h5py.File(file, "a") as handle:
        del handle["depth"]
        handle.create_dataset("depth", (2, 2), "<f4", external=[(str(tmp_path / "other.h5"), 0, 16)])
    with pytest.raises(UserError, match="is stored in another file"):
        read_depth_file(file)


def test_a_huge_labeled_mat_is_checked_before_reading(tmp_path: Path) -> None:
    import scipy.io

    file = tmp_path / "nyu_depth_v2_labeled.mat"
    scipy.io.savemat(tmp_path / "splits.mat", {"trainNdxs": [[1]], "testNdxs": [[2]]})
    with h5py.File(file, "w") as handle:
        handle.create_dataset("images", (2, 3, 50_000, 50_000), np.uint8, chunks=True)
        handle.create_dataset("rawDepths", (2, 50_000, 50_000), np.float32, chunks=True)
    with pytest.raises(UserError, match="2500 million pixels"):
        LabeledMat(file, "val", "raw")
