"""splits.mat is read as SciPy reads it; damaged or impossible ones are refused."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import scipy.io

from tests.support.damage import damaged
from uvim_fsq.errors import UserError
from uvim_fsq.tasks.nyu_depth.splits_mat import read_splits


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


@pytest.mark.slow
def test_large_compressed_splits_are_read_in_little_memory(tmp_path: Path) -> None:
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
def test_damaged_splits_are_detected(tmp_path: Path, packed: bool) -> None:
    """SciPy raises other exceptions for some of them, or crashes the process."""
    rng, file = np.random.default_rng(0), tmp_path / "splits.mat"
    order = 1 + rng.permutation(60)[:, None].astype(np.uint16)
    scipy.io.savemat(file, {"trainNdxs": order[:40], "testNdxs": order[40:]}, do_compression=packed)
    whole, truth, noticed = file.read_bytes(), read_splits(file), 0
    for _ in range(200):
        file.write_bytes(damaged(whole, rng))
        try:
            # Uncompressed numbers have no checksum; the adapter compares them with the number of images.
            assert read_splits(file) == truth or not packed
        except UserError as error:
            noticed += 1
            assert str(error).startswith(f"{file} is damaged (") and "\n" not in str(error)
    assert noticed > 80


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [([1, 2], [2], "twice"), ([0, 1], [2], "not list"), ([1.5], [2], "not list"), ([], [1], "not list")],
)
def test_impossible_splits_are_refused(tmp_path: Path, train: list[float], test: list[float], message: str) -> None:
    scipy.io.savemat(tmp_path / "splits.mat", {"trainNdxs": np.array(train), "testNdxs": np.array(test)})
    with pytest.raises(UserError, match=message):
        read_splits(tmp_path / "splits.mat")
    scipy.io.savemat(tmp_path / "splits.mat", {"trainNdxs": np.array([1])})
    with pytest.raises(UserError, match="lacks"):
        read_splits(tmp_path / "splits.mat")
