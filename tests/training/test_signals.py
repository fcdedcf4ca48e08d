"""Signals to training and evaluation, in one process and in several."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from tests.support.ranks import finish, start, start_ranks
from tests.support.runs import fit_run, training_lines
from tests.support.small import ORACLE, oracle_run
from uvim_fsq.checkpoints import files as ckpt
from uvim_fsq.cli import main
from uvim_fsq.errors import UserError
from uvim_fsq.tasks.nyu_depth.metrics import DepthMetric
from uvim_fsq.training.signals import Interrupted, StopSignals
from uvim_fsq.training.stages import OracleStage
from uvim_fsq.training.trainer import Trainer


def slow(started: str, *arguments: str) -> None:
    """The command line, with steps of 3 s and evaluation without end; the file `started` appears when either begins."""
    original = OracleStage.step

    def step(*given):
        Path(started).touch()
        time.sleep(3)
        return original(*given)

    def update(*_):
        Path(started).touch()
        time.sleep(10_000)

    OracleStage.step = step
    DepthMetric.update = update
    main(list(arguments))


def start_alone(target: str, *arguments: str) -> subprocess.Popen[str]:
    """One process without a launcher, in a session of its own."""
    return start([sys.executable, "-m", "tests.support.ranks", "1", target, *arguments])


def wait_for(what: Callable[[], object]) -> None:
    deadline = time.monotonic() + 300
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.fixture
def slow_run(tmp_path: Path, data: Path) -> list[str]:
    """Arguments of `slow`: an oracle that logs every 50 steps, which takes minutes, with loader processes."""
    config = tmp_path / "oracle.yaml"
    config.write_text(yaml.safe_dump(ORACLE))
    settings = ["train.steps=100", "train.log_every=50", "data.workers=2", f"train.out={tmp_path / 'run'}"]
    return [str(tmp_path / "started"), "train-oracle", str(config), f"data.root={data}", *settings]


@pytest.mark.multi
@pytest.mark.slow
def test_a_signal_to_all_ranks_and_their_loaders_saves(tmp_path: Path, slow_run: list[str]) -> None:
    process = start_ranks(2, "tests.training.test_signals:slow", *slow_run)
    wait_for((tmp_path / "started").exists)
    os.killpg(process.pid, signal.SIGTERM)
    said = finish(process)
    assert len(re.findall("stopped by signal 15 after step .; saved", said)) == 1, said
    assert said[: said.find("torch/distributed")].count("Traceback") == 0, said
    assert len(ckpt.checkpoints(tmp_path / "run")) == 1
    assert not list((tmp_path / "run" / "checkpoints").glob(".tmp*"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_to_a_run_saves_and_ends_its_loaders(
    tmp_path: Path, slow_run: list[str], number: signal.Signals
) -> None:
    process = start_alone("tests.training.test_signals:slow", *slow_run)
    wait_for((tmp_path / "started").exists)
    workers = children(process.pid)
    assert len(workers) == 2
    if number == signal.SIGKILL:
        process.kill()
    else:
        os.killpg(process.pid, number)
    said = finish(process)
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))
    if number != signal.SIGKILL:
        assert process.returncode == 128 + number, said
        assert "saved" in said and "train.resume=auto" in said and "Traceback" not in said and "rror" not in said
        assert len(ckpt.checkpoints(tmp_path / "run")) == 1


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_an_evaluation_ends_it_without_a_traceback(
    tmp_path: Path, oracle_dir: Path, number: signal.Signals
) -> None:
    arguments = [str(tmp_path / "started"), "evaluate", str(oracle_dir), "eval.workers=2", "eval.batch_size=1"]
    process = start_alone("tests.training.test_signals:slow", *arguments)
    wait_for((tmp_path / "started").exists)
    os.killpg(process.pid, number)
    said = finish(process)
    # The first line says that it has begun.
    assert process.returncode == 128 + number and len(said.strip().splitlines()) == 2, said


@pytest.mark.slow
def test_a_signal_during_evaluation_acts_at_once(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = oracle_run(tmp_path / "run", data, "train.steps=4", "train.eval_every=2")
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(DepthMetric, "update", lambda *_: os.kill(os.getpid(), signal.SIGTERM) or time.sleep(10_000))
        with pytest.raises(Interrupted) as caught:
            fit_run(run)
    assert caught.value.code == 143 and signal.getsignal(signal.SIGTERM) == before
    assert "stopped by signal 15 during the evaluation of step 2; saved" in capsys.readouterr().out
    assert [p.name for p in ckpt.checkpoints(tmp_path / "run")] == [ckpt.step_name(2)]
    fit_run(replace(run, train=replace(run.train, resume="auto")))
    figures = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    evaluated = [line["step"] for line in map(json.loads, figures) if "eval/rmse" in line]
    assert evaluated == [2, 4], "what the signal prevented is done again"
    whole = fit_run(replace(run, train=replace(run.train, out=str(tmp_path / "whole"))))
    assert training_lines(tmp_path / "run") == training_lines(whole)


def test_a_lost_connection_after_a_signal_is_reported_as_the_signal(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The process that waits in C++ for those that a signal ends during evaluation."""
    received: list[StopSignals] = []
    original = StopSignals.at_once
    monkeypatch.setattr(StopSignals, "at_once", lambda self: received.append(self) or original(self))

    def evaluate(*_: object, **__: object) -> None:
        if signaled:
            received[-1].number = signal.SIGTERM
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(Trainer, "evaluate", evaluate)
    for signaled, kind in ((True, Interrupted), (False, RuntimeError)):
        with pytest.raises(kind):
            fit_run(oracle_run(tmp_path / kind.__name__, data, "train.steps=3"))
        said = "during the evaluation of step 3; saved" in capsys.readouterr().out
        assert said == signaled


def test_the_first_signal_is_recorded_and_the_second_interrupt_acts(monkeypatch: pytest.MonkeyPatch) -> None:
    with StopSignals() as signals:
        for number in (signal.SIGTERM, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert signals.number == signal.SIGTERM
        with pytest.raises(Interrupted), signals.at_once():
            raise AssertionError("a signal that came before counts")
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        # The terminal and the launcher send one each.
        monkeypatch.setenv("LOCAL_RANK", "0")
        os.kill(os.getpid(), signal.SIGINT)
    with StopSignals() as signals, signals.at_once(), pytest.raises(Interrupted) as caught:
        os.kill(os.getpid(), signal.SIGINT)
    assert caught.value.code == 130


def test_a_killed_loader_process_ends_training_in_one_line(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever training is at that moment."""
    original = OracleStage.step

    def step(*given):
        os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGKILL)
        time.sleep(60)
        return original(*given)

    monkeypatch.setattr(OracleStage, "step", step)
    with pytest.raises(UserError, match="a loader process died .*lower data.workers"):
        fit_run(oracle_run(tmp_path / "run", data, "data.workers=2"))
