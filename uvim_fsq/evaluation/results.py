"""RUN/evaluation.json: where the result of an evaluation lies, and whether it is whole.

The file holds the evaluation of the run as it was trained. A result with other settings lies beside it under a name
made of them, so it never takes the place of the full one.
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

#: What a whole result holds, of all that `evaluate_loaded` gives: what tables are made of.
NEEDED = ("main_metric", "protocol", "data", "images", "limit", "figures", "checkpoint_sha256", "versions")
#: Longest name made of settings.
LONGEST = 60


def result_file(run_dir: Path) -> Path:
    """The evaluation of a run as it was trained."""
    return run_dir / "evaluation.json"


def read_result(run_dir: Path) -> dict[str, Any]:
    """The evaluation of a run. Raises UserError if it is damaged, FileNotFoundError if there is none."""
    file = result_file(run_dir)
    remedy = f"evaluate again: uvim-fsq evaluate {run_dir}"
    result = read_json(file, remedy)
    missing = [key for key in NEEDED if key not in result]
    if missing:
        raise UserError(f"{file} is damaged (it lacks {missing[0]!r}); {remedy}")
    return result


def finished(run_dir: Path) -> bool:
    """Training and evaluation are done; a damaged result does not count."""
    try:
        read_result(run_dir)
    except (FileNotFoundError, UserError):
        return False
    return True


def beside(path: Path, overrides: Mapping[str, Sequence[Any]]) -> Path:
    """`path`, or where `overrides` (key -> [trained value, present value]) can change figures a name beside it that
    says which, e.g. evaluation_limit-5.json."""
    asked = {key: after for key, (_, after) in overrides.items() if not _is_idle(key)}
    if not asked:
        return path
    whole = "_".join(f"{key.rpartition('.')[2]}-{value}" for key, value in sorted(asked.items()))
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", whole)[:LONGEST]
    if name != whole:
        name += "_" + hashlib.sha256(whole.encode()).hexdigest()[:6]
    return path.with_name(f"{path.stem}_{name}{path.suffix}")


def _is_idle(key: str) -> bool:
    """Whether a setting has no bearing on the figures of a trained run."""
    return key in SPEED or key.startswith(("train.", "optim."))
