"""The training loop: which steps are logged, saved and evaluated, signals, and errors."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from tests.support.runs import fit_run, training_lines
from tests.support.small import lm_run, oracle_run
from uvim_fsq import processes
from uvim_fsq.checkpoints import files as ckpt
from uvim_fsq.config.parse import dump_yaml
from uvim_fsq.errors import UserError
from uvim_fsq.training import loop
from uvim_fsq.training.loop import fit
from uvim_fsq.training.optim import learning_rate
from uvim_fsq.training.progress import Progress
from uvim_fsq.training.signals import Interrupted
from uvim_fsq.training.stages import OracleStage, build_stage
from uvim_fsq.training.trainer import Trainer


@pytest.mark.parametrize("stage", ["oracle", "lm"])
def test_log_lines_have_speed_and_waiting_time(stage: str, oracle_dir: Path, lm_dir: Path) -> None:
    run_dir = oracle_dir if stage == "oracle" else lm_dir
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    stepped = [line for line in lines if "loss" in line]
    assert stepped
    for line in stepped:
        assert line["images_per_second"] > 0 and 0 < line["mfu"] < 1 and 0 <= line["data_wait"] <= 1
    peaks = [line["images_per_second"] / line["mfu"] for line in stepped]
    assert max(peaks) == pytest.approx(min(peaks))


def test_unreadable_samples_are_skipped_and_counted(tmp_path: Path, data: Path) -> None:
    broken = tmp_path / "data"
    shutil.copytree(data, broken)
    victim = sorted(broken.rglob("train/**/*.h5"))[0]
    victim.write_bytes(victim.read_bytes()[:300])
    with pytest.raises(UserError, match=f"{victim.name}.*max_bad_samples=0"):
        fit_run(oracle_run(tmp_path / "strict", broken))
    fit_run(oracle_run(tmp_path / "lenient", broken, "data.max_bad_samples=9"))
    last = json.loads((tmp_path / "lenient" / "metrics.jsonl").read_text().splitlines()[-2])
    assert last["bad_samples"] >= 1


@pytest.mark.slow
def test_which_steps_are_logged_saved_and_evaluated(tmp_path: Path, data: Path) -> None:
    keys = ["train.steps=9", "train.keep=99"]
    every = training_lines(fit_run(oracle_run(tmp_path / "every", data, *keys)))
    sparse = ["train.log_every=4", "train.save_every=2", "train.eval_every=3", "train.eval_limit=2"]
    out = fit_run(oracle_run(tmp_path / "sparse", data, *keys, *sparse))
    assert [p.name for p in ckpt.checkpoints(out)] == [ckpt.step_name(n) for n in (2, 3, 4, 6, 8, 9)]
    evaluated = training_lines(out, "eval/rmse")
    assert [(line["step"], line["eval/images"]) for line in evaluated] == [(3, 2), (6, 2), (9, 2)]
    logged = training_lines(out)
    assert [line["step"] for line in logged] == [2, 3, 4, 6, 8, 9], "each checkpoint is logged, too"
    assert [line["step"] for line in every] == list(range(1, 10))
    optim = oracle_run(tmp_path / "every", data, *keys).optim
    assert [line["lr"] for line in every] == [learning_rate(step, 9, optim) for step in range(9)]
    last = 0
    for line in logged:
        window = every[last : int(line["step"])]
        last = int(line["step"])
        for key in ("loss", "grad_norm", "bin_accuracy"):
            assert line[key] == pytest.approx(sum(one[key] for one in window) / len(window), rel=1e-4)
        assert line["lr"] == window[-1]["lr"]
    ckpt_weights = safetensors.torch.load_file(ckpt.checkpoints(tmp_path / "every")[-1] / ckpt.WEIGHTS)
    ours = safetensors.torch.load_file(ckpt.checkpoints(out)[-1] / ckpt.WEIGHTS)
    assert all(torch.equal(ours[name], value) for name, value in ckpt_weights.items())


def test_by_default_only_the_last_step_is_saved_and_evaluated(tmp_path: Path, data: Path) -> None:
    """Without save_every and eval_every only the end is saved and evaluated; steps are logged by log_every."""
    out = fit_run(oracle_run(tmp_path / "run", data, "train.log_every=2", "train.steps=5", "optim.clip_norm=null"))
    assert [line["step"] for line in training_lines(out)] == [2, 4, 5] and len(ckpt.checkpoints(out)) == 1
    assert [line["step"] for line in training_lines(out, "eval/rmse")] == [5]


def test_a_run_starts_with_its_files_and_one_line(
    tmp_path: Path, data: Path, oracle_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loop, "matrix_rate", lambda device, precision: {"fp32": 1e12}[precision])
    wide = ["model.width=64", "train.precision=bf16"]
    (tmp_path / "run" / "checkpoints" / ".tmp_step_00000007").mkdir(parents=True)
    run = lm_run(tmp_path / "run", oracle_dir, "train.steps=1", "train.accumulate=2", "optim.warmup_steps=0", *wide)
    stage = build_stage(run)
    parameters = sum(p.numel() for p in stage.model.parameters()) / 1e6
    closed: list[bool] = []
    close = Progress.close
    monkeypatch.setattr(Progress, "close", lambda self: closed.append(True) or close(self))
    stepped: list[int] = []
    monkeypatch.setattr(Progress, "stepped", lambda self, step: stepped.append(step))
    fit(stage, run)
    assert closed and stepped == [1]
    said = capsys.readouterr().out.splitlines()[0]
    assert re.match(rf"training on .*: {parameters:.2f} M parameters, 24 samples, batch 8 = 4 x 2 x 1 ", said)
    assert said.endswith(f"step 0 of 1, into {tmp_path / 'run'}")
    assert (tmp_path / "run" / "config.yaml").read_text() == dump_yaml(run)
    assert (tmp_path / "run" / "oracle" / ckpt.WEIGHTS).is_file()
    assert not list((tmp_path / "run" / "checkpoints").glob(".tmp*"))
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert line["images_per_second"] / line["mfu"] == pytest.approx(1e12 / stage.train_flops())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "bad", "kept"),
    [
        ("loss", 2, "no checkpoint was written yet"),
        ("loss", 5, "step_00000003. "),
        ("gradient norm", 6, "step_00000003. "),
    ],
)
def test_the_first_step_that_is_not_finite_is_named(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, what: str, bad: int, kept: str
) -> None:
    original = OracleStage.step
    count = itertools.count(1)

    def step(self, model, batch):
        loss, logs = original(self, model, batch)
        if next(count) == bad:
            # Of a root at 0 the value is finite and the slope is not.
            loss = loss * float("nan") if what == "loss" else loss + (loss * 0).sqrt()
        return loss, logs

    monkeypatch.setattr(OracleStage, "step", step)
    with pytest.raises(UserError, match=f"the {what} is not finite at step {bad};.*{kept}"):
        fit_run(oracle_run(tmp_path / "run", data, "train.log_every=6", "train.save_every=3"))


def test_bad_samples_of_all_processes_are_logged(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Trainer.__init__

    def start(self, stage, run):
        original(self, stage, run)
        self.loader.bad, self.loader.news = {3: "mine"}, True

    monkeypatch.setattr(Trainer, "__init__", start)
    others = [{4: "theirs", 3: "mine"}, {9: "third"}]
    monkeypatch.setattr(processes, "gather", lambda value: [value, *(others if isinstance(value, dict) else ())])
    # Not in evaluation, which is not about this.
    monkeypatch.setattr(Trainer, "evaluate", lambda *_, **__: None)
    out = fit_run(oracle_run(tmp_path / "run", data, "data.max_bad_samples=3"))
    assert [line["bad_samples"] for line in training_lines(out)] == [3.0] * 6
    with pytest.raises(UserError, match="3 unreadable training samples"):
        fit_run(oracle_run(tmp_path / "strict", data, "data.max_bad_samples=2"))


@pytest.mark.slow
@pytest.mark.parametrize("other", [False, True], ids=["here", "in another process"])
def test_a_signal_ends_training_after_the_step(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], other: bool
) -> None:
    original = OracleStage.step
    count = itertools.count(1)

    def step(self, model, batch):
        if next(count) == 3 and not other:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, model, batch)

    monkeypatch.setattr(OracleStage, "step", step)
    if other:
        asked = itertools.count(1)
        monkeypatch.setattr(processes.Agreement, "ask", lambda *_: [next(asked) == 3, False])
    run = oracle_run(tmp_path / "run", data, "train.log_every=50", "train.save_every=1", "train.keep=1")
    with pytest.raises(Interrupted) as caught:
        fit_run(run)
    assert caught.value.code == (143 if other else 130)
    said = capsys.readouterr().out
    assert f"stopped by signal {15 if other else 2} after step 3; saved. Continue" in said and "evaluation" not in said
    assert [p.name for p in ckpt.checkpoints(tmp_path / "run")] == [ckpt.step_name(3)]
    assert [line["step"] for line in training_lines(tmp_path / "run")] == [1, 2, 3]
    monkeypatch.undo()
    again = fit_run(replace(run, train=replace(run.train, resume="auto")))
    assert "step 3 of 6" in capsys.readouterr().out
    assert [line["step"] for line in training_lines(again)] == [1, 2, 3, 4, 5, 6]
    assert [p.name for p in ckpt.checkpoints(again)][-1] == ckpt.step_name(6)
