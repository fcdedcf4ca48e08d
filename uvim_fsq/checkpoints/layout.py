"""The names of the files of checkpoints and exports, and their hashes. Imports nothing of the package."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

CONFIG = "config.yaml"
WEIGHTS = "model.safetensors"
STATE = "trainer/state.pt"
SUMS = "sha256.json"
#: The results of training's own evaluation; a checkpoint without this file was not evaluated.
FIGURES = "evaluation.json"
#: The decoding settings that `uvim-fsq tune` chose.
DECODING = "decoding.json"
#: The folder of an LM's copy of its oracle.
ORACLE = "oracle"
#: The file that makes a folder an export.
EXPORT = "export.json"


def is_export(place: str | Path) -> bool:
    """Whether a folder holds what `uvim-fsq export` writes, as opposed to a run or a checkpoint."""
    return os.path.isfile(os.path.join(place, EXPORT))  # False for any name that cannot be a folder's


def file_hash(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
