"""Damages files."""

from __future__ import annotations

import numpy as np


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
