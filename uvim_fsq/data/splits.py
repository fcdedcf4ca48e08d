"""The holdout split: a fixed part of the training set for tuning, chosen by md5 of each name, so that it is the same on
every machine.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence

import numpy as np

SPLITS = ("train", "val", "holdout", "train_minus_holdout")
#: Held-out training images of COCO and ImageNet, as in the UViM reference code (big_vision).
HOLDOUT = 4096


def holdout_mask(names: Sequence[str]) -> np.ndarray:
    """(N,) bool, True for the held-out names: the first 4096 by md5, or the first tenth of fewer than 40,960 names."""
    count = HOLDOUT if len(names) >= 10 * HOLDOUT else len(names) // 10
    order = sorted(range(len(names)), key=lambda i: hashlib.md5(os.fsencode(names[i]), usedforsecurity=False).digest())
    mask = np.zeros(len(names), bool)
    mask[order[:count]] = True
    return mask


def share_images(one: str, two: str) -> bool:
    """Whether two splits, as far as their names tell, have images in common."""
    return one == two or ("train" in (one, two) and {one, two} <= {"train", "holdout", "train_minus_holdout"})


def split_rows(split: str, names: Sequence[str]) -> np.ndarray:
    """(M,) int64 positions in `names` that belong to `split` (one of `SPLITS`), in order.

    `names` lists the training images, or for "val" the validation images.
    """
    rows = np.arange(len(names))
    if split in ("holdout", "train_minus_holdout"):
        rows = rows[holdout_mask(names) == (split == "holdout")]
    return rows
