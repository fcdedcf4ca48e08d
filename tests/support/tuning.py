"""Runs that were tuned: the file that `uvim-fsq tune` leaves, written by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from uvim_fsq.checkpoints.run_directory import checkpoints, weights_hash
from uvim_fsq.checkpoints.tuned import DECODING, TUNED_KEYS
from uvim_fsq.config.schema import EvalConfig

DEFAULT: dict[str, Any] = {key: getattr(EvalConfig, key) for key in TUNED_KEYS}
#: Settings that differ from the default in every key that an autoregressive LM has but top_p.
SETTINGS: dict[str, Any] = {
    "codes": "soft",
    "code_scale": 0.7,
    "context_weight": 0.3,
    "samples": 2,
    "temperature": 0.5,
    "top_k": 9,
}


def write_tuned(run_dir: Path, settings: dict[str, Any] | None = None, **changes: Any) -> Path:
    """Writes decoding.json into a run's last checkpoint, with `changes` to its record; returns the file."""
    checkpoint = checkpoints(run_dir)[-1]
    record = {
        "settings": DEFAULT | (SETTINGS if settings is None else settings),
        "split": "holdout",
        "other_root": "",
        "images": 5,
        "metric": "rmse",
        "checkpoint_sha256": weights_hash(checkpoint),
        **changes,
    }
    file = checkpoint / DECODING
    file.write_text(json.dumps(record))
    return file
