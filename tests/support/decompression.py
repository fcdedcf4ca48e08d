"""Files that claim, or unpack to, far more than they hold."""

from __future__ import annotations

import struct
import tracemalloc
import zlib
from collections.abc import Callable

import pytest

from uvim_fsq.data import images
from uvim_fsq.errors import UserError


def png(width: int, height: int, depth: int = 8, colors: int = 2) -> bytes:
    """A valid PNG of zeros, which compresses a thousandfold."""
    channels = {0: 1, 2: 3}[colors]
    row = b"\0" * (1 + width * channels * depth // 8)
    packer = zlib.compressobj(1)
    body = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colors, 0, 0, 0)
    return images._PNG + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def peak(work: Callable[[], object]) -> float:
    """Peak of Python's and NumPy's memory in MB while a call raises UserError."""
    tracemalloc.start()
    try:
        with pytest.raises(UserError) as caught:
            work()
        assert "\n" not in str(caught.value)
        return tracemalloc.get_traced_memory()[1] / 1e6
    finally:
        tracemalloc.stop()


def claim(shape: tuple[int, ...], dtype: str = "<f4") -> bytes:
    """The header of a .npy file without its data."""
    text = repr({"descr": dtype, "fortran_order": False, "shape": shape}).ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()
