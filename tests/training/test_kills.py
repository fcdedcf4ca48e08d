"""A run that was killed at any point and resumed ends like one that was not."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.support.kills import Killed, killing
from tests.support.paths import ROOT
from tests.support.runs import ENV, STEPS, at, fit_run, last_weights, losses, outcome
from tests.support.small import LM, ORACLE, oracle_run
from uvim_fsq.checkpoints import files as ckpt
from uvim_fsq.checkpoints.loading import load_checkpoint
from uvim_fsq.checkpoints.run_directory import step_name
from uvim_fsq.files import read_json_lines
from uvim_fsq.training import trainer
from uvim_fsq.training.progress import Progress
from uvim_fsq.training.step import Stepper
from uvim_fsq.training.trainer import Trainer

POINTS: dict[str, tuple[Any, str, str]] = {
    "in the middle of a save": (torch, "save", "before"),
    "after a save": (Trainer, "evaluate", "before"),
    "after the evaluation": (trainer, "write_whole", "before"),
    "after the picture": (Progress, "evaluated", "before"),
    "after the log line": (ckpt, "record_evaluation", "before"),
    "after the mark": (ckpt, "record_evaluation", "after"),
    "in the middle of deleting": (shutil, "rmtree", "before"),
    "after deleting": (ckpt, "prune", "after"),
}


@pytest.mark.slow
@pytest.mark.parametrize("point", POINTS)
def test_a_kill_at_any_point_loses_nothing(tmp_path: Path, data: Path, quick_evaluation: None, point: str) -> None:
    """Weights, log, pictures, evaluations and the best checkpoint are those of a run that nothing disturbed."""
    common = [*STEPS, "data.selection_split=train"]
    whole = outcome(fit_run(oracle_run(tmp_path / "whole", data, *common)))
    best = load_checkpoint(tmp_path / "whole").checkpoint.name
    values = {k: v["figures"]["rmse"] for k, v in whole.items() if k.endswith("evaluated") and v}
    assert len(values) == 2 and best != step_name(8), "the best must not be the last, or this tests nothing"
    place, name, when = POINTS[point]
    for countdown in (1, 2, 3):
        out = tmp_path / f"killed{countdown}"
        run = oracle_run(out, data, *common, "train.resume=auto")
        with killing(place, name, when, countdown) as calls, pytest.raises(Killed):
            fit_run(run)
        assert len(calls) == countdown
        assert outcome(fit_run(run)) == whole
        assert load_checkpoint(out).checkpoint.name == best


@pytest.mark.slow
def test_a_missing_evaluation_is_done_before_any_step(
    tmp_path: Path, data: Path, quick_evaluation: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also at the end of training, and a checkpoint without it is not deleted."""
    out = tmp_path / "run"
    run = oracle_run(out, data, *STEPS, "train.resume=auto")
    with killing(Trainer, "evaluate", "before", 4), pytest.raises(Killed):
        fit_run(run)
    assert at(out, 8).is_dir() and not (at(out, 8) / ckpt.FIGURES).exists()
    monkeypatch.setattr(Stepper, "optimizer_step", None)
    fit_run(run)
    assert (at(out, 8) / ckpt.FIGURES).exists()
    evaluated = [line["step"] for line in read_json_lines(out / "metrics.jsonl") if "eval/rmse" in line]
    assert evaluated == [2, 4, 6, 8]
    monkeypatch.setattr(Trainer, "evaluate", None)
    fit_run(run)


@pytest.mark.slow
def test_a_run_killed_during_evaluation_resumes_exactly(tmp_path: Path, oracle_dir: Path) -> None:
    """A process killed between save and evaluation, resumed, ends as one that was not killed."""
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({**LM, "stage": "lm"}))
    keys = [f"oracle={oracle_dir}", "data.selection_split=holdout"]
    keys += ["train.eval_every=2", "train.ema=0.9", "train.keep=1", "train.resume=auto"]
    base = [sys.executable, "-m", "uvim_fsq", "train-lm", str(file), *keys]
    env = {**ENV, "PYTHONPATH": str(ROOT)}
    subprocess.run([*base, f"train.out={tmp_path / 'whole'}"], env=env, check=True, capture_output=True)
    out = tmp_path / "killed"
    process = subprocess.Popen([*base, f"train.out={out}"], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.time() + 600
    while not at(out, 4).is_dir() and process.poll() is None and time.time() < deadline:
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert at(out, 4).is_dir() and not (at(out, 4) / ckpt.FIGURES).exists(), "the kill came at the wrong time"
    subprocess.run([*base, f"train.out={out}"], env=env, check=True, capture_output=True)
    assert outcome(out) == outcome(tmp_path / "whole")


def command(config: dict, folder: Path, *overrides: str) -> list[str]:
    file = folder / f"{config['stage']}.yaml"
    file.write_text(yaml.safe_dump(config))
    return ["-m", "uvim_fsq", "train-oracle" if config["stage"] == "oracle" else "train-lm", str(file), *overrides]


@pytest.mark.slow
def test_a_killed_run_resumes_exactly(tmp_path: Path, data: Path) -> None:
    overrides = [f"data.root={data}", "train.steps=40", "train.save_every=5", "train.keep=9"]
    whole = [sys.executable, *command(ORACLE, tmp_path, *overrides, f"train.out={tmp_path / 'whole'}")]
    subprocess.run(whole, env=ENV, check=True, capture_output=True)
    out = tmp_path / "killed"
    killed = [sys.executable, *command(ORACLE, tmp_path, *overrides, f"train.out={out}", "train.resume=auto")]
    process = subprocess.Popen(killed, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.time() + 600
    while not ckpt.checkpoints(out) and time.time() < deadline and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert ckpt.checkpoints(out) and len(ckpt.checkpoints(out)) < 8, "the kill came too late to test anything"
    subprocess.run(killed, env=ENV, check=True, capture_output=True)
    assert losses(tmp_path / "whole") == losses(out)
    one, two = last_weights(tmp_path / "whole"), last_weights(out)
    assert all(torch.equal(one[name], two[name]) for name in one)
