"""The hold-out: a fixed part of a training set for tuning, by the md5 of each name, hence the same everywhere."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence

import numpy as np

SPLITS = ("train", "val", "holdout", "train_minus_holdout")
#: The reference holds out this many training images of COCO and ImageNet.
HOLDOUT = 4096


def holdout_mask(names: Sequence[str]) -> np.ndarray:
    """(N,) bool, True for the held-out names: the first 4096 by md5, of a set below 40,960 the first tenth."""
    count = HOLDOUT if len(names) >= 10 * HOLDOUT else len(names) // 10
    order = sorted(range(len(names)), key=lambda i: hashlib.md5(os.fsencode(names[i]), usedforsecurity=False).digest())
    mask = np.zeros(len(names), bool)
    mask[order[:count]] = True
    return mask


def split_rows(split: str, names: Sequence[str]) -> np.ndarray:
    """The positions that `split` takes of the file list behind it (see `SPLITS`), in order."""
    rows = np.arange(len(names))
    if split in ("holdout", "train_minus_holdout"):
        rows = rows[holdout_mask(names) == (split == "holdout")]
    return rows
