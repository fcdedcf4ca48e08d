"""Run directories: which checkpoints they hold, and the configuration inside. Knows nothing of torch.

RUN/checkpoints/step_00001000/config.yaml and RUN/checkpoints/best.json; the rest is training/checkpoint.py's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from uvim_fsq.config import LMRun, OracleRun, Run
from uvim_fsq.config_io import load_run, read_yaml, resolve_lm
from uvim_fsq.config_rules import validate
from uvim_fsq.errors import UserError
from uvim_fsq.identity import check_overrides

WEIGHTS = "model.safetensors"
#: Settings that earlier versions wrote into checkpoints, and that mean nothing any more.
RETIRED = (("model", "head_chunks"),)


def step_name(step: int) -> str:
    """The directory name of a step's checkpoint."""
    return f"step_{step:08d}"


def checkpoints(run_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(p for p in (run_dir / "checkpoints").glob("step_*") if (p / WEIGHTS).is_file())


def read_best(run_dir: Path) -> dict[str, Any] | None:
    """{"step", "metric", "value"} of the best checkpoint, if any was recorded."""
    file = run_dir / "checkpoints" / "best.json"
    return json.loads(file.read_text()) if file.is_file() else None


def resolve_checkpoint(path: str | Path, prefer: str = "best") -> Path:
    """A run directory or a checkpoint directory -> the checkpoint: the best one (or the last), or the one given.

    Raises UserError for a missing path or a directory that holds no checkpoint.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such run or checkpoint directory")
    if (path / WEIGHTS).is_file():
        return path
    found = checkpoints(path)
    if not found:
        inside = [str(folder) for folder in sorted(path.glob("*/")) if checkpoints(folder)]
        remedy = f"did you mean {' or '.join(inside[:3])}?" if inside else "give a run directory of training"
        raise UserError(f"{path} holds no checkpoint (neither {WEIGHTS} nor checkpoints/step_*); {remedy}")
    best = read_best(path)
    if prefer == "best" and best and path / "checkpoints" / step_name(best["step"]) in found:
        return path / "checkpoints" / step_name(best["step"])
    return found[-1]


def read_config(checkpoint: Path, overrides: Sequence[str] = ()) -> Run:
    """The configuration a checkpoint directory carries, with `key=value` overrides.

    Raises UserError if it holds none, and for overrides that are misspelt or impossible.
    """
    file = checkpoint / "config.yaml"
    if not file.is_file():
        raise UserError(f"{checkpoint} holds no config.yaml; give a run directory or one of its checkpoints")
    tree = read_yaml(file)
    for section, key in RETIRED:
        if isinstance(tree.get(section), dict):
            tree[section].pop(key, None)
    run = load_run(tree, overrides)
    if overrides:
        trained = load_run(tree)
        check_overrides(run, trained)
        validate(run, trained)
    return run


def read_oracle_config(path: str | Path) -> tuple[OracleRun, Path]:
    """The oracle configuration behind a run or checkpoint directory, and that checkpoint."""
    checkpoint = resolve_checkpoint(path)
    run = read_config(checkpoint)
    if not isinstance(run, OracleRun):
        raise UserError(f"{path} is a checkpoint of stage {run.stage!r}, not of an oracle; point `oracle=` at stage I")
    return run, checkpoint


def inherit(run: Run) -> Run:
    """Fills an LM's configuration from its oracle's checkpoint. Raises UserError for impossible combinations."""
    if isinstance(run, LMRun):
        run = resolve_lm(run, read_oracle_config(run.oracle)[0])
    validate(run)
    return run


def find_oracle(checkpoint: Path, run: LMRun) -> Path:
    """The oracle of an LM checkpoint: the copy inside its run directory, else the path it was trained with."""
    for place in (checkpoint.parent.parent / "oracle", checkpoint / "oracle"):
        if (place / "model.safetensors").is_file():
            return place
    return Path(run.oracle)
