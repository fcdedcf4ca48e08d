"""Paths of evaluation results, and a check that a result is complete.

RUN/evaluation.json contains the evaluation of a run with its trained settings. A result with other settings is written
next to it, under a name derived from these settings, and never replaces it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from uvim_fsq.checkpoints.identity import SPEED
from uvim_fsq.errors import UserError
from uvim_fsq.files import read_json

#: Keys that a complete result must have. They are the part of `evaluate_loaded`'s result that tables use.
REQUIRED_KEYS = ("main_metric", "protocol", "data", "images", "limit", "figures", "checkpoint_sha256", "versions")
#: Maximum length of a name derived from settings.
MAX_NAME_LENGTH = 60


def result_file(run_dir: Path) -> Path:
    """The path of a run's evaluation with its trained settings."""
    return run_dir / "evaluation.json"


def states_file(result: Path) -> Path:
    """The path of what each image added to the metrics of a result, next to it (`intervals.write_states`)."""
    return result.with_suffix(".npz")


def read_result(run_dir: Path, file: Path | None = None) -> dict[str, Any]:
    """Reads the evaluation of a run, or one in another file.

    Raises UserError if it is damaged, FileNotFoundError if there is none.
    """
    file = file or result_file(run_dir)
    remedy = f"evaluate again: uvim-fsq evaluate {run_dir}"
    result = read_json(file, remedy)
    missing = [key for key in REQUIRED_KEYS if key not in result]
    if missing:
        raise UserError(f"{file} is damaged (it lacks {missing[0]!r}); {remedy}")
    return result


def finished(run_dir: Path, file: Path | None = None) -> bool:
    """Whether a run was trained and evaluated, into `file` if given. A damaged result does not count."""
    try:
        read_result(run_dir, file)
    except (FileNotFoundError, UserError):
        return False
    return True


def variant_path(path: Path, overrides: Mapping[str, Sequence[Any]]) -> Path:
    """The path of a result with overrides: `path` with the settings appended to its name.

    Args:
        path: the path without overrides, e.g. evaluation.json.
        overrides: key -> [trained value, current value].

    Returns, for example, evaluation_limit-5.json; or `path` itself if no override can change the results.
    """
    relevant = {key: after for key, (_, after) in overrides.items() if not _is_irrelevant(key)}
    if not relevant:
        return path
    full = "_".join(f"{key.rpartition('.')[2]}-{value}" for key, value in sorted(relevant.items()))
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", full)[:MAX_NAME_LENGTH]
    if name != full:
        name += "_" + hashlib.sha256(full.encode()).hexdigest()[:6]
    return path.with_name(f"{path.stem}_{name}{path.suffix}")


def _is_irrelevant(key: str) -> bool:
    """Whether a setting cannot affect the evaluation of a trained run."""
    return key in SPEED or key.startswith(("train.", "optim."))
