"""Helpers of tests about run directories: what a run leaves, and another process that holds it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from tests.support.evaluation import shake
from tests.support.paths import ROOT
from uvim_fsq.checkpoints import files as ckpt
from uvim_fsq.checkpoints.run_directory import checkpoints, file_hash, step_name
from uvim_fsq.config.schema import Run
from uvim_fsq.files import read_json_lines
from uvim_fsq.training.loop import fit
from uvim_fsq.training.stages import build_stage
from uvim_fsq.training.trainer import Trainer

#: Of log lines, what differs from run to run by its nature.
TIMED = ("images_per_second", "mfu", "data_wait")
#: A resumption with other settings has to be asked for.
CHANGED = ["train.resume_changes=true"]
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}


#: Evaluations, saves and averages in a few steps.
STEPS = ["train.steps=8", "train.eval_every=2", "train.save_every=1", "train.keep=1", "train.ema=0.5"]


def sign(checkpoint: Path) -> None:
    """Brings a checkpoint's recorded hashes up to date with its files, as whoever edits them on purpose would."""
    record = json.loads((checkpoint / ckpt.SUMS).read_text())
    kept = {name: value for name, value in record.items() if name == "oracle"}
    hashes = {name: file_hash(checkpoint / name) for name in record if (checkpoint / name).is_file()}
    (checkpoint / ckpt.SUMS).write_text(json.dumps(hashes | kept))


def fit_run(run: Run) -> Path:
    return fit(build_stage(run), run)


def save_untrained(run: Run) -> Path:
    """The run directory of a resolved configuration: one checkpoint with random weights."""
    out, stage = Path(run.train.out), build_stage(run)
    shake(stage.model)
    out.mkdir()
    Trainer(stage, run).save()
    stage.write_artifacts(out)
    return out


def outcome(run_dir: Path) -> dict[str, Any]:
    """All that a run leaves, without what differs by its nature."""
    lines = read_json_lines(run_dir / "metrics.jsonl")
    found: dict[str, Any] = {"metrics": [{k: v for k, v in line.items() if k not in TIMED} for line in lines]}
    for path in checkpoints(run_dir):
        found[path.name] = file_hash(path / ckpt.WEIGHTS)
        evaluation = path / ckpt.FIGURES
        found[f"{path.name} evaluated"] = json.loads(evaluation.read_text()) if evaluation.exists() else None
    found["panels"] = {p.name: p.read_bytes() for p in (run_dir / "panels").iterdir()}
    with contextlib.suppress(FileNotFoundError):
        found["result"] = json.loads((run_dir / "evaluation.json").read_text())["figures"]
    return found


def training_lines(run_dir: Path, key: str = "loss") -> list[dict[str, float]]:
    """The log lines that have `key`, without the measured speeds."""
    lines = read_json_lines(run_dir / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in TIMED} for line in lines if key in line]


def losses(run_dir: Path) -> list[float]:
    """The logged training losses."""
    return [line["loss"] for line in training_lines(run_dir)]


def last_weights(run_dir: Path) -> dict[str, torch.Tensor]:
    """The weights of the newest checkpoint."""
    return weights(checkpoints(run_dir)[-1])


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(checkpoint / ckpt.WEIGHTS)


def at(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / step_name(step)


@contextlib.contextmanager
def another_process(run_dir: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds a run directory's lock until its input ends."""
    code = "import sys; from pathlib import Path; from uvim_fsq.training.lock import run_lock\n"
    code += "with run_lock(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    env = {**ENV, "PYTHONPATH": str(ROOT)}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", code, str(run_dir)], env=env, **pipes)
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def sign_all(run: Path) -> None:
    """`sign` for every checkpoint of a run, its copy of the oracle included."""
    for sums in run.rglob(ckpt.SUMS):
        sign(sums.parent)
