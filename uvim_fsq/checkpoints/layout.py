"""The names of the files of a checkpoint directory, and their hashes. Imports nothing of the package."""

from __future__ import annotations

import hashlib
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


def file_hash(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
