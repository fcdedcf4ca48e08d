"""Damaged files of depth data are noticed, and said in one line."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import h5py
import numpy as np
import pytest
import scipy.io

from tests.support.small import small_data
from uvim_fsq.errors import UserError
from uvim_fsq.tasks.nyu_depth.data import open_source, prepare
from uvim_fsq.tasks.nyu_depth.files import read_depth_file
from uvim_fsq.tasks.nyu_depth.splits_mat import read_splits
from uvim_fsq.tasks.nyu_depth.task import NYUDepthConfig

CONFIG = NYUDepthConfig(protocol="full")


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """One bit or byte changed, the end cut off, or some bytes overwritten."""
    at, changed = int(rng.integers(len(data))), bytearray(data)
    kind = rng.integers(5)
    if kind == 0:
        changed[at] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        changed[at] = (changed[at] + int(rng.integers(1, 256))) % 256
    elif kind == 2:
        del changed[at:]
    else:
        end = min(len(data), at + (8 if kind == 3 else 64))
        changed[at:end] = rng.bytes(end - at) if kind == 3 else bytes(end - at)
    return bytes(changed)


@pytest.mark.parametrize("kind", ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"])
@pytest.mark.parametrize("packed", [False, True])
def test_splits_are_read_as_scipy_reads_them(tmp_path: Path, packed: bool, kind: str) -> None:
    train, test = np.arange(1, 100, 2)[:, None], np.array([[2], [4], [120]])
    file, other = tmp_path / "splits.mat", {"note": "text", "cell": np.array([[1, "a"]], object)}
    scipy.io.savemat(
        file,
        {**other, "trainNdxs": train.astype(kind), "testNdxs": test.astype(kind), "last": 1.5},
        do_compression=packed,
    )
    assert read_splits(file) == ([*range(0, 99, 2)], [1, 3, 119])


def test_splits_that_unpack_to_much_are_never_held_whole(tmp_path: Path) -> None:
    file, size = tmp_path / "splits.mat", 8_000_000
    arrays = {f"v{i}": np.zeros((size, 1), np.uint8) for i in range(12)}
    indices = {"trainNdxs": np.array([[1.0]]), "testNdxs": np.array([[2.0]])}
    scipy.io.savemat(file, {**arrays, **indices}, do_compression=True)
    tracemalloc.start()
    try:
        assert read_splits(file) == ([0], [1])
        assert tracemalloc.get_traced_memory()[1] < 8 * size
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("packed", [False, True])
def test_damaged_splits(tmp_path: Path, packed: bool) -> None:
    """5 of 30 were tracebacks, and some ended the process within SciPy."""
    rng, file = np.random.default_rng(0), tmp_path / "splits.mat"
    order = 1 + rng.permutation(60)[:, None].astype(np.uint16)
    scipy.io.savemat(file, {"trainNdxs": order[:40], "testNdxs": order[40:]}, do_compression=packed)
    whole, truth, noticed = file.read_bytes(), read_splits(file), 0
    for _ in range(200):
        file.write_bytes(damaged(whole, rng))
        try:
            # Plain numbers carry no checksum; the adapter compares them with the number of images.
            assert read_splits(file) == truth or not packed
        except UserError as error:
            noticed += 1
            assert str(error).startswith(f"{file} is damaged (") and "\n" not in str(error)
    assert noticed > 80


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [([1, 2], [2], "twice"), ([0, 1], [2], "not list"), ([1.5], [2], "not list"), ([], [1], "not list")],
)
def test_impossible_splits(tmp_path: Path, train: list[float], test: list[float], message: str) -> None:
    scipy.io.savemat(tmp_path / "splits.mat", {"trainNdxs": np.array(train), "testNdxs": np.array(test)})
    with pytest.raises(UserError, match=message):
        read_splits(tmp_path / "splits.mat")
    scipy.io.savemat(tmp_path / "splits.mat", {"trainNdxs": np.array([1])})
    with pytest.raises(UserError, match="lacks"):
        read_splits(tmp_path / "splits.mat")


def test_damaged_prepared_files(tmp_path: Path) -> None:
    """13 of 30 were used in silence."""
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


def test_a_chunk_larger_than_its_picture_is_never_unpacked(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        chunked = {"maxshape": (None, None), "chunks": (20_000, 20_000), "compression": "gzip"}
        file.create_dataset("depth", shape=(24, 32), dtype="f4", **chunked)
    with pytest.raises(UserError, match="dataset 'depth' has 20000 x 20000, 400 million pixels"):
        read_depth_file(tmp_path / "a.h5")
