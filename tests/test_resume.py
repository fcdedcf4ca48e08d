"""How a run goes on: killed at any point, with other averages, from an older checkpoint, beside another training."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.support.ranks import finish, run_ranks, start_ranks
from tests.support.runs import CHANGED, ENV, STEPS, another_process, at, fitted, outcome, weights
from tests.support.small import LM, ORACLE, lm_run, oracle_run
from uvim_fsq.checkpoints import files as ckpt
from uvim_fsq.checkpoints.loading import load_checkpoint
from uvim_fsq.checkpoints.run_directory import checkpoints, step_name
from uvim_fsq.cli import main as cli
from uvim_fsq.errors import UserError
from uvim_fsq.files import read_json_lines
from uvim_fsq.training import trainer
from uvim_fsq.training.progress import Progress
from uvim_fsq.training.stages import build_stage
from uvim_fsq.training.trainer import Trainer


class Killed(BaseException):
    """Stands in for a kill: nothing catches it."""


# --- killed at any point ---------------------------------------------------------------------------------------

POINTS: dict[str, tuple[Any, str, str]] = {
    "in the middle of a save": (torch, "save", "before"),
    "after a save": (Trainer, "evaluate", "before"),
    "after the evaluation": (trainer, "write_whole", "before"),
    "after the picture": (Progress, "evaluated", "before"),
    "after the log line": (ckpt, "write_evaluation", "before"),
    "after the mark": (ckpt, "write_evaluation", "after"),
    "in the middle of deleting": (shutil, "rmtree", "before"),
    "after deleting": (ckpt, "prune", "after"),
}


@contextlib.contextmanager
def killing(place: Any, name: str, when: str, countdown: int) -> Iterator[list[int]]:
    """Raises `Killed` before or after the call of `place.name` number `countdown`."""
    original: Callable[..., Any] = getattr(place, name)
    calls: list[int] = []

    def call(*arguments: Any, **named: Any) -> Any:
        # A folder that is not there is not deleted.
        if name != "rmtree" or arguments[0].exists():
            calls.append(1)
        if when == "before" and len(calls) == countdown:
            raise Killed
        result = original(*arguments, **named)
        if when == "after" and len(calls) == countdown:
            raise Killed
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place, name, call)
        yield calls


@pytest.mark.parametrize("point", POINTS)
def test_a_kill_at_any_point_loses_nothing(tmp_path: Path, data: Path, quick_evaluation: None, point: str) -> None:
    """Weights, log, pictures, evaluations and the best checkpoint are those of a run that nothing disturbed."""
    common = [*STEPS, "data.selection_split=train"]
    whole = outcome(fitted(oracle_run(tmp_path / "whole", data, *common)))
    best = load_checkpoint(tmp_path / "whole").checkpoint.name
    values = {k: v["figures"]["rmse"] for k, v in whole.items() if k.endswith("evaluated") and v}
    assert len(values) == 2 and best != step_name(8), "the best must not be the last, or this tests nothing"
    place, name, when = POINTS[point]
    for countdown in (1, 2, 3):
        out = tmp_path / f"killed{countdown}"
        run = oracle_run(out, data, *common, "train.resume=auto")
        with killing(place, name, when, countdown) as calls, pytest.raises(Killed):
            fitted(run)
        assert len(calls) == countdown
        assert outcome(fitted(run)) == whole
        assert load_checkpoint(out).checkpoint.name == best


def test_the_missing_evaluation_comes_before_any_step(
    tmp_path: Path, data: Path, quick_evaluation: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also at the end of training, and a checkpoint without it is not deleted."""
    out = tmp_path / "run"
    run = oracle_run(out, data, *STEPS, "train.resume=auto")
    with killing(Trainer, "evaluate", "before", 4), pytest.raises(Killed):
        fitted(run)
    assert at(out, 8).is_dir() and not (at(out, 8) / ckpt.FIGURES).exists()
    monkeypatch.setattr(Trainer, "optimizer_step", None)
    fitted(run)
    assert (at(out, 8) / ckpt.FIGURES).exists()
    evaluated = [line["step"] for line in read_json_lines(out / "metrics.jsonl") if "eval/rmse" in line]
    assert evaluated == [2, 4, 6, 8]
    monkeypatch.setattr(Trainer, "evaluate", None)
    fitted(run)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["oracle", "lm"])
def test_sigkill_in_an_evaluation(tmp_path: Path, data: Path, oracle_dir: Path, stage: str) -> None:
    """A process killed between save and evaluation, resumed, ends as one that was not killed."""
    config = {**(ORACLE if stage == "oracle" else LM), "stage": stage}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(config))
    keys = [f"data.root={data}" if stage == "oracle" else f"oracle={oracle_dir}", "data.selection_split=holdout"]
    keys += ["train.eval_every=2", "train.ema=0.9", "train.keep=1", "train.resume=auto"]
    base = [sys.executable, "-m", "uvim_fsq", f"train-{stage}", str(file), *keys]
    env = {**ENV, "PYTHONPATH": str(Path(__file__).parents[1])}
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


# --- averages ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", ["0.9", "null"])
@pytest.mark.parametrize("before", ["0.9", "null"])
def test_averages_switched_on_and_off_at_resume(
    tmp_path: Path, data: Path, quick_evaluation: None, before: str, after: str
) -> None:
    """An average begins with the loaded weights; without one, training goes on from the trained weights."""
    out = tmp_path / "run"
    fitted(oracle_run(out, data, "train.steps=6", "train.save_every=3", f"train.ema={before}", "train.keep=9"))
    shutil.rmtree(at(out, 6))
    state = torch.load(at(out, 3) / ckpt.STATE, weights_only=True)
    trained = state.get("raw", weights(at(out, 3)))
    run = oracle_run(out, data, "train.steps=6", f"train.ema={after}", "train.resume=auto", *CHANGED)
    resumed = Trainer(build_stage(run), run)
    resumed.resume()
    now = dict(resumed.stage.model.named_parameters())
    assert ("raw" in state) == (before != "null")
    assert all(torch.equal(now[name], trained[name]) for name in now)
    if after == "null":
        assert resumed.ema is None
    else:
        saved = weights(at(out, 3))
        assert resumed.ema is not None and all(torch.equal(resumed.ema[name], saved[name]) for name in now)
        assert all(resumed.ema[name].data_ptr() != now[name].data_ptr() for name in now)


# --- older, broken and foreign checkpoints ----------------------------------------------------------------------


def test_going_on_from_an_older_checkpoint(
    tmp_path: Path, data: Path, quick_evaluation: None, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    keys = ["train.steps=8", "train.save_every=2", "train.eval_every=2", "train.keep=9"]
    fitted(oracle_run(out, data, *keys))
    whole = outcome(out)
    (out / "evaluation.json").write_text("{}")
    run = oracle_run(out, data, *keys, f"train.resume={at(out, 4)}")
    with killing(Trainer, "optimizer_step", "before", 1), pytest.raises(Killed):
        fitted(run)
    assert "2 newer checkpoint(s) moved to" in capsys.readouterr().out
    assert [p.name for p in checkpoints(out)] == [step_name(2), step_name(4)]
    assert sorted(p.name for p in (out / ckpt.SET_ASIDE).iterdir()) == [step_name(6), step_name(8)]
    assert not (out / "evaluation.json").exists(), "a run that goes on has no result"
    assert {line["step"] for line in read_json_lines(out / "metrics.jsonl")} == {1, 2, 3, 4}
    assert outcome(fitted(oracle_run(out, data, *keys, "train.resume=auto"))) == whole
    (out / "evaluation.json").write_text("{}")
    fitted(oracle_run(out, data, *keys, "train.resume=auto"))
    assert (out / "evaluation.json").exists()


def test_a_damaged_evaluation_is_found_at_once(tmp_path: Path, data: Path, quick_evaluation: None) -> None:
    """Not when old checkpoints are deleted."""
    out = tmp_path / "run"
    keys = ["train.steps=8", "train.eval_every=2", "train.keep=9", "data.selection_split=train", "train.resume=auto"]
    fitted(oracle_run(out, data, *keys))
    shutil.rmtree(at(out, 8))
    (at(out, 2) / ckpt.FIGURES).write_text("{")
    with (
        pytest.raises(UserError, match="evaluation.json is damaged.*; remove it"),
        killing(Trainer, "_load", "before", 1),
    ):
        fitted(oracle_run(out, data, *keys))
    (at(out, 2) / ckpt.FIGURES).unlink()
    fitted(oracle_run(out, data, *keys))
    assert at(out, 8).is_dir()


def test_a_checkpoint_of_another_run_is_not_evaluated_again(tmp_path: Path, data: Path, quick_evaluation: None) -> None:
    """The run that continues it has no such checkpoint, which would hold an evaluation and nothing else."""
    first = fitted(oracle_run(tmp_path / "first", data, "train.steps=4", "train.save_every=2"))
    keys = ["train.steps=4", "train.eval_every=2", "train.resume_changes=true", f"train.resume={at(first, 2)}"]
    out = fitted(oracle_run(tmp_path / "second", data, *keys))
    assert [place.name for place in (out / "checkpoints").iterdir()] == [step_name(4)]


@pytest.mark.parametrize("name", ["trainer/state.pt", "model.safetensors"])
def test_a_broken_newest_checkpoint(tmp_path: Path, data: Path, quick_evaluation: None, name: str) -> None:
    out = tmp_path / "run"
    fitted(oracle_run(out, data, "train.steps=4", "train.save_every=2"))
    (at(out, 4) / name).write_bytes(b"")
    with pytest.raises(UserError, match=f"{name} is damaged.*the one before it: train.resume={at(out, 2)}$"):
        fitted(oracle_run(out, data, "train.steps=4", "train.resume=auto"))
    fitted(oracle_run(out, data, "train.steps=4", f"train.resume={at(out, 2)}"))
    shutil.rmtree(at(out, 2))
    (at(out, 4) / name).write_bytes(b"")
    with pytest.raises(UserError, match="damaged") as caught:
        fitted(oracle_run(out, data, "train.steps=4", "train.resume=auto"))
    assert "before it" not in str(caught.value)


def test_a_broken_newest_checkpoint_of_an_lm(tmp_path: Path, oracle_dir: Path, quick_evaluation: None) -> None:
    out = fitted(lm_run(tmp_path / "lm", oracle_dir, "train.steps=4", "train.save_every=2"))
    for name in ("sha256.json", "config.yaml"):
        (at(out, 4) / name).write_bytes(b"{")
        with pytest.raises(UserError, match=f"{name} is damaged.*the one before it: train.resume={at(out, 2)}$"):
            lm_run(out, oracle_dir, "train.steps=4", "train.resume=auto")
        shutil.copytree(at(out, 2), at(out, 4), dirs_exist_ok=True)


# --- several processes ------------------------------------------------------------------------------------------


def rank_in_own_folder(folder: str, data: str) -> None:
    """What a rank runs: training in a directory of its own under the same name, as on machines that share no disk."""
    os.chdir(Path(folder) / f"rank{os.environ['RANK']}")
    file = Path("run.yaml")
    file.write_text(yaml.safe_dump(ORACLE))
    keys = [f"data.root={data}", "train.out=run", "train.resume=auto"]
    cli(["train-oracle", str(file), *keys])


@pytest.mark.multi
@pytest.mark.slow
@pytest.mark.parametrize("case", ["missing", "another", "damaged"])
def test_ranks_resume_the_same_checkpoint_or_stop(tmp_path: Path, data: Path, oracle_dir: Path, case: str) -> None:
    out = [tmp_path / f"rank{rank}" / "run" for rank in (0, 1)]
    for place in out:
        shutil.copytree(oracle_dir, place)
    other = weights(at(out[1], 6))
    if case == "missing":
        shutil.rmtree(at(out[1], 6))
    elif case == "damaged":
        (at(out[1], 6) / ckpt.WEIGHTS).write_bytes(b"")
    else:
        config = (at(out[1], 6) / "config.yaml").read_text()
        state = torch.load(at(out[1], 6) / ckpt.STATE, weights_only=True)
        moved = {name: value + 1 for name, value in other.items()}
        ckpt.save_checkpoint(out[1], 6, config=config, weights=moved, state=state)
    process = start_ranks(2, "tests.test_resume:rank_in_own_folder", str(tmp_path), str(data))
    said = finish(process)
    wanted = {
        "missing": "error: process 1 has no run/checkpoints/step_00000006; the run directory must be one",
        "damaged": "error: run/checkpoints/step_00000006/model.safetensors is damaged",
        "another": "error: the processes loaded different checkpoints from run/checkpoints/step_00000006",
    }
    assert process.returncode != 0 and wanted[case] in said, said
    assert [p.name for p in checkpoints(out[0])] == [step_name(6)]


@pytest.mark.multi
@pytest.mark.slow
def test_two_ranks_save_resume_and_lock(tmp_path: Path, data: Path) -> None:
    """Only the first takes the lock, and all stop where another training holds it."""
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(ORACLE))
    keys = ["train-oracle", str(file), f"data.root={data}", "data.selection_split=holdout", "train.eval_every=2"]
    out = tmp_path / "run"
    with another_process(out):
        process = start_ranks(2, "cli", *keys, f"train.out={out}")
        said = finish(process)
        assert process.returncode != 0 and "is being trained by process" in said, said
    run_ranks(2, "cli", *keys, f"train.out={out}")
    for late in checkpoints(out)[1:]:
        shutil.rmtree(late)
    run_ranks(2, "cli", *keys, f"train.out={out}", "train.resume=auto")
    run_ranks(2, "cli", *keys, f"train.out={tmp_path / 'whole'}")
    assert outcome(out)["metrics"] == outcome(tmp_path / "whole")["metrics"]
