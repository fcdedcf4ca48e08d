"""Resumption: bit for bit, with other averages, and from older, damaged or foreign checkpoints."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from tests.support.kills import Killed, killing
from tests.support.runs import CHANGED, at, fit_run, last_weights, losses, outcome, weights
from tests.support.small import lm_run, oracle_run, stage_run
from uvim_fsq.checkpoints import files as ckpt
from uvim_fsq.checkpoints.run_directory import checkpoints, step_name
from uvim_fsq.errors import UserError
from uvim_fsq.files import read_json_lines
from uvim_fsq.training.stages import build_stage
from uvim_fsq.training.step import Stepper
from uvim_fsq.training.trainer import Trainer


@pytest.mark.slow
@pytest.mark.parametrize("after", ["0.9", "null"])
@pytest.mark.parametrize("before", ["0.9", "null"])
def test_averaging_can_be_switched_on_and_off_when_resuming(
    tmp_path: Path, data: Path, quick_evaluation: None, before: str, after: str
) -> None:
    """An average begins with the loaded weights; without one, training goes on from the trained weights."""
    out = tmp_path / "run"
    fit_run(oracle_run(out, data, "train.steps=6", "train.save_every=3", f"train.ema={before}", "train.keep=9"))
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
        assert resumed.stepper.ema is None
    else:
        saved = weights(at(out, 3))
        average = resumed.stepper.ema
        assert average is not None and all(torch.equal(average[name], saved[name]) for name in now)
        assert all(average[name].data_ptr() != now[name].data_ptr() for name in now)


@pytest.mark.slow
def test_resuming_from_an_older_checkpoint_sets_the_newer_ones_aside(
    tmp_path: Path, data: Path, quick_evaluation: None, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    keys = ["train.steps=8", "train.save_every=2", "train.eval_every=2", "train.keep=9"]
    fit_run(oracle_run(out, data, *keys))
    whole = outcome(out)
    (out / "evaluation.json").write_text("{}")
    run = oracle_run(out, data, *keys, f"train.resume={at(out, 4)}")
    with killing(Stepper, "optimizer_step", "before", 1), pytest.raises(Killed):
        fit_run(run)
    assert "2 newer checkpoint(s) moved to" in capsys.readouterr().out
    assert [p.name for p in checkpoints(out)] == [step_name(2), step_name(4)]
    assert sorted(p.name for p in (out / ckpt.SET_ASIDE).iterdir()) == [step_name(6), step_name(8)]
    assert not (out / "evaluation.json").exists(), "a run that goes on has no result"
    assert {line["step"] for line in read_json_lines(out / "metrics.jsonl")} == {1, 2, 3, 4}
    assert outcome(fit_run(oracle_run(out, data, *keys, "train.resume=auto"))) == whole
    (out / "evaluation.json").write_text("{}")
    fit_run(oracle_run(out, data, *keys, "train.resume=auto"))
    assert (out / "evaluation.json").exists()


@pytest.mark.slow
def test_a_damaged_evaluation_stops_resuming_at_once(tmp_path: Path, data: Path, quick_evaluation: None) -> None:
    """Not when old checkpoints are deleted."""
    out = tmp_path / "run"
    keys = ["train.steps=8", "train.eval_every=2", "train.keep=9", "data.selection_split=train", "train.resume=auto"]
    fit_run(oracle_run(out, data, *keys))
    shutil.rmtree(at(out, 8))
    (at(out, 2) / ckpt.FIGURES).write_text("{")
    with (
        pytest.raises(UserError, match="evaluation.json is damaged.*; remove it"),
        killing(Trainer, "_load", "before", 1),
    ):
        fit_run(oracle_run(out, data, *keys))
    (at(out, 2) / ckpt.FIGURES).unlink()
    fit_run(oracle_run(out, data, *keys))
    assert at(out, 8).is_dir()


def test_a_checkpoint_of_another_run_is_not_evaluated_again(tmp_path: Path, data: Path, quick_evaluation: None) -> None:
    """The run that continues it has no such checkpoint, which would hold an evaluation and nothing else."""
    first = fit_run(oracle_run(tmp_path / "first", data, "train.steps=4", "train.save_every=2"))
    keys = ["train.steps=4", "train.eval_every=2", "train.resume_changes=true", f"train.resume={at(first, 2)}"]
    out = fit_run(oracle_run(tmp_path / "second", data, *keys))
    assert [place.name for place in (out / "checkpoints").iterdir()] == [step_name(4)]


@pytest.mark.parametrize("name", ["trainer/state.pt", pytest.param("model.safetensors", marks=pytest.mark.slow)])
def test_a_damaged_newest_checkpoint_names_the_one_before_it(
    tmp_path: Path, data: Path, quick_evaluation: None, name: str
) -> None:
    out = tmp_path / "run"
    fit_run(oracle_run(out, data, "train.steps=4", "train.save_every=2"))
    (at(out, 4) / name).write_bytes(b"")
    with pytest.raises(UserError, match=f"{name} is damaged.*the one before it: train.resume={at(out, 2)}$"):
        fit_run(oracle_run(out, data, "train.steps=4", "train.resume=auto"))
    fit_run(oracle_run(out, data, "train.steps=4", f"train.resume={at(out, 2)}"))
    shutil.rmtree(at(out, 2))
    (at(out, 4) / name).write_bytes(b"")
    with pytest.raises(UserError, match="damaged") as caught:
        fit_run(oracle_run(out, data, "train.steps=4", "train.resume=auto"))
    assert "before it" not in str(caught.value)


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_of_an_lm_names_the_one_before_it(
    tmp_path: Path, oracle_dir: Path, quick_evaluation: None
) -> None:
    out = fit_run(lm_run(tmp_path / "lm", oracle_dir, "train.steps=4", "train.save_every=2"))
    for name in ("sha256.json", "config.yaml"):
        (at(out, 4) / name).write_bytes(b"{")
        with pytest.raises(UserError, match=f"{name} is damaged.*the one before it: train.resume={at(out, 2)}$"):
            lm_run(out, oracle_dir, "train.steps=4", "train.resume=auto")
        shutil.copytree(at(out, 2), at(out, 4), dirs_exist_ok=True)


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("adafactor", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "stage", ["oracle", *(pytest.param(name, marks=pytest.mark.slow) for name in ("lm", "direct"))]
)
def test_a_resumed_run_equals_an_uninterrupted_one(
    tmp_path: Path, data: Path, oracle_dir: Path, stage: str, optimizer: str
) -> None:
    """2N steps = N, stop, resume, N; over an epoch's end, with augmentation, dropout and EMA."""
    extra = ["train.ema=0.9", "train.save_every=3", "train.accumulate=2", f"optim.name={optimizer}"]
    extra += ["model.width=32", "model.mlp_dim=64"]  # adafactor factors nothing that is smaller

    def make(out: Path, *overrides: str):
        dropout = ["model.dropout=0.1"] if stage == "lm" else []
        return stage_run(stage, out, data, oracle_dir, *dropout, *extra, *overrides)

    whole = fit_run(make(tmp_path / "whole"))
    halves = fit_run(make(tmp_path / "halves"))
    for late in ckpt.checkpoints(halves)[1:]:
        os.rename(late, tmp_path / f"gone_{late.name}")
    halves = fit_run(make(tmp_path / "halves", "train.resume=auto"))
    assert losses(whole) == losses(halves) and len(losses(whole)) == 6
    one, two = last_weights(whole), last_weights(halves)
    assert all(torch.equal(one[name], two[name]) for name in one)
