"""Several processes give what one gives; an error or a signal in one of them ends all, with the true message."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
import yaml

from tests.support.ranks import finish, run_ranks, start, start_ranks
from tests.support.small import ORACLE, lm_run, oracle_run
from uvim_fsq import processes
from uvim_fsq.checkpoints import files as ckpt
from uvim_fsq.checkpoints.loading import build_task
from uvim_fsq.cli import main
from uvim_fsq.config.schema import Run
from uvim_fsq.data.loader import TrainLoader
from uvim_fsq.errors import UserError
from uvim_fsq.evaluation.run import evaluate
from uvim_fsq.tasks.nyu_depth.metrics import DepthMetric
from uvim_fsq.training.loop import fit
from uvim_fsq.training.run import train
from uvim_fsq.training.signals import Interrupted, StopSignals
from uvim_fsq.training.stages import OracleStage, build_stage
from uvim_fsq.training.step import make_accelerator
from uvim_fsq.training.trainer import Trainer

RANKS = 3


def lines(run_dir: Path) -> list[dict[str, float]]:
    """What was logged of training steps, without the speeds."""
    every = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    speeds = {"images_per_second", "mfu", "data_wait"}
    return [{k: v for k, v in line.items() if k not in speeds} for line in every if "loss" in line]


# ---------------------------------------------------------------- as one


def configurations(folder: Path, data: Path, oracle: Path) -> dict[str, Run]:
    """Both stages, both quantizers. Three ranks split 8 images as 3 + 3 + 2, accumulating as 2 + 2 + 1 + 1 + 1 + 1."""
    plain = ["train.steps=4", "model.code_dropout=none"]
    vq = ["model.quantizer.kind=vq", "model.quantizer.codebook_size=16", "model.quantizer.codeword_dim=8"]
    return {
        "oracle": oracle_run(folder / "oracle", data, *plain, "train.log_every=2", "train.eval_every=2"),
        "vq": oracle_run(folder / "vq", data, *plain, *vq, "train.accumulate=2"),
        "lm": lm_run(folder / "lm", oracle, "train.steps=4", "train.accumulate=2"),
    }


def damaged(data: Path, copy: Path, split: str, count: int) -> Path:
    """A copy of the data with `count` files of a split broken."""
    shutil.copytree(data, copy)
    for victim in sorted(copy.rglob(f"{split}/**/*.h5"))[:count]:
        victim.write_bytes(victim.read_bytes()[:300])
    return copy


def train_all(folder: str, data: str, oracle: str, bad: str) -> None:
    """Trains and evaluates every configuration, evaluates fewer images than there are ranks, trains on bad data."""
    torch.set_num_threads(1)
    for run in configurations(Path(folder), Path(data), Path(oracle)).values():
        train(run)
    fit_run(oracle_run(Path(folder) / "bad", Path(bad), "train.steps=4", "data.max_bad_samples=4"))
    main(["evaluate", f"{folder}/lm", "--limit=2", f"--json={folder}/few.json", f"--csv={folder}/few.csv"])
    assert not torch.distributed.is_initialized(), "the command has not parted from the others"


def fit_run(run: Run) -> Path:
    return fit(build_stage(run), run)


@pytest.mark.multi
def test_a_process_that_waits_for_the_others_can_be_ended(tmp_path: Path) -> None:
    """A launcher that gives up sends SIGTERM; the processes that have already come wait inside torch."""
    waits = "from uvim_fsq.training.signals import ended_by_sigterm\nfrom uvim_fsq import processes\n"
    waits += "with ended_by_sigterm():\n    print('waiting', flush=True)\n    processes.state()\n"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    joins = {"ACCELERATE_USE_CPU": "true", "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **joins, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    process = subprocess.Popen([sys.executable, "-c", waits], env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "waiting\n"
    # It listens as soon as it is inside.
    while process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            break
        except OSError:
            time.sleep(0.1)
    process.terminate()
    try:
        assert process.wait(120) == -signal.SIGTERM
    finally:
        process.kill()


@pytest.mark.multi
@pytest.mark.slow
def test_three_ranks_equal_one(tmp_path: Path, data: Path, oracle_dir: Path) -> None:
    others = (str(data), str(oracle_dir), str(damaged(data, tmp_path / "data", "train", 4)))
    said = run_ranks(RANKS, "tests.test_processes:train_all", str(tmp_path / "three"), *others)
    assert said.count("written: ") == 1, "one process prints and writes"
    assert said.count(f"batch 8 = {8 / RANKS:g} x 1 x {RANKS} ") == 2
    train_all(str(tmp_path / "one"), *others)
    for name in configurations(tmp_path, data, oracle_dir):
        one, three = tmp_path / "one" / name, tmp_path / "three" / name
        assert len(lines(one)) == len(lines(three)) > 1
        for ours, theirs in zip(lines(three), lines(one), strict=True):
            # The last bit of a logit may decide which is the largest.
            bits = {key: 2e-3 if key.endswith("accuracy") else 2e-5 for key in theirs}
            assert all(abs(ours[key] - theirs[key]) <= bits[key] for key in bits), (name, ours, theirs)
        ours, theirs = (safetensors.torch.load_file(ckpt.checkpoints(d)[-1] / ckpt.WEIGHTS) for d in (three, one))
        for key, value in theirs.items():
            assert torch.allclose(ours[key], value, atol=2e-4, rtol=1e-3), (name, key)
        assert_same_result(three / "evaluation.json", one / "evaluation.json")
    assert_same_result(tmp_path / "three" / "few.json", tmp_path / "one" / "few.json")
    rows = (tmp_path / "three" / "few.csv").read_text().splitlines()
    assert sorted(rows) == sorted((tmp_path / "one" / "few.csv").read_text().splitlines()) and len(rows) == 1 + 3 * 2
    for count in ("one", "three"):
        # Three steps meet every file, each in one of the ranks, and in the fourth all know.
        assert lines(tmp_path / count / "bad")[-1]["bad_samples"] == 4
        state, _ = ckpt.load_trainer_state(ckpt.checkpoints(tmp_path / count / "bad")[-1])
        assert len(state["bad_samples"]) == 4 and all(".h5" in text for text in state["bad_samples"].values())


def assert_same_result(ours: Path, theirs: Path) -> None:
    """Figures, and sums over all images."""
    one, other = (json.loads(file.read_text()) for file in (ours, theirs))
    assert one["images"] == other["images"] and one["code_counts"] == other["code_counts"]
    assert one["figures"].keys() == other["figures"].keys()
    for way, figures in one["figures"].items():
        assert figures == pytest.approx(other["figures"][way], abs=1e-4), way


# ---------------------------------------------------------------- errors


def out_of_memory(*arguments: str) -> None:
    """The command line, with a step that fails on the second of two ranks."""
    plain = OracleStage.step

    def step(*given):
        if processes.state().process_index == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(*given)

    OracleStage.step = step
    main(list(arguments))


@pytest.mark.multi
@pytest.mark.slow
def test_an_error_on_one_rank_ends_all_with_its_message(tmp_path: Path, data: Path, oracle_dir: Path) -> None:
    config = tmp_path / "oracle.yaml"
    config.write_text(yaml.safe_dump(ORACLE))
    bad = [damaged(data, tmp_path / split, split, 1) for split in ("train", "val")]
    train = ("train-oracle", str(config))
    bad_file = (*train, f"train.out={tmp_path / 'bad'}", f"data.root={bad[0]}", "data.max_bad_samples=0")
    no_memory = (*train, f"train.out={tmp_path / 'memory'}", f"data.root={data}")
    # As on a machine without a GPU where nobody has said so: Accelerate would not see that there are two.
    silent = {"ACCELERATE_USE_CPU": "false"}
    started = {
        "cannot be read": start_ranks(2, "cli", *bad_file),
        "^error: not enough memory .CUDA": start_ranks(2, "tests.test_processes:out_of_memory", *no_memory),
        "cannot be read.*": start_ranks(2, "cli", "evaluate", str(oracle_dir), f"data.root={bad[1]}", env=silent),
    }
    for message, process in started.items():
        said = finish(process)
        ours = said[: said.find("torch/distributed/elastic")]
        assert process.returncode == 1 and len(re.findall(message, said, re.M)) == 1, said
        # Whoever was waiting is ended by the launcher, or says one line.
        assert "Traceback" not in ours and ours.count("stopped: another process") <= 1, said
        assert "gloo" not in ours and "Connection" not in ours, said


def test_what_is_said_of_another_process() -> None:
    other = processes._peer_failure
    gone = "[/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1"
    assert "has exited" in (other(RuntimeError(gone)) or "")
    assert "does not respond" in (other(RuntimeError("[gloo/x.cc] Timed out waiting 900000ms for recv")) or "")
    assert "has exited" in (other(torch.distributed.DistBackendError("NCCL error: remote process exited")) or "")
    assert other(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None and other(OSError("gloo")) is None


@pytest.mark.parametrize("variable", processes.UNSUPPORTED)
def test_other_ways_of_training_are_refused(
    variable: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, data: Path, oracle_dir: Path
) -> None:
    monkeypatch.setenv(variable, "true")
    with pytest.raises(UserError, match=f"^{variable}=true: .* not supported"):
        train(oracle_run(tmp_path / "run", data))
    with pytest.raises(UserError, match=f"^{variable}=true"):
        evaluate(oracle_dir)
    with pytest.raises(UserError, match=f"^{variable}=true"):
        make_accelerator(oracle_run(tmp_path / "run", data).train)
    assert not (tmp_path / "run").exists()


def test_several_processes_that_do_not_find_each_other(
    monkeypatch: pytest.MonkeyPatch, oracle_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for command, message in (("evaluate", "WORLD_SIZE=2.*accelerate launch"), ("predict", "one process, not in 2")):
        more = ["x.png", "--out=x"] if command == "predict" else []
        with pytest.raises(SystemExit) as caught:
            main([command, str(oracle_dir), *more])
        assert caught.value.code == 2 and re.fullmatch(f"error: .*{message}.*\n", capsys.readouterr().err)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "2"}, "other launcher variables are missing"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, "other launcher variables are missing"),
        ({"LOCAL_RANK": "0"}, "other launcher variables are missing .*MASTER_ADDR"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two is not a number of processes"),
    ],
)
def test_some_of_a_launchers_variables(oracle_dir: Path, variables: dict[str, str], message: str) -> None:
    """In a process of its own: here Accelerate's state is made already."""
    process = start([sys.executable, "-m", "uvim_fsq", "evaluate", str(oracle_dir)], env=variables)
    said = finish(process)
    assert process.returncode == 2 and re.fullmatch(f"(.*loading ...\n)?error: .*{message}.*\n", said), said


def different(value: object) -> list[object]:
    """In place of `processes.gather`: what a second process would give that has loaded something else."""
    return [value, None if isinstance(value, Path) or value is None else value[::-1]]  # type: ignore[index]


def test_processes_that_have_loaded_different_things(
    tmp_path: Path, data: Path, oracle_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where nothing is resumed: an LM's oracle, and the checkpoint to evaluate."""
    monkeypatch.setattr(processes, "gather", different)
    with pytest.raises(UserError, match="different checkpoints from .*step_00000006"):
        evaluate(oracle_dir)
    with pytest.raises(UserError, match="different checkpoints from the oracle's run"):
        fit_run(lm_run(tmp_path / "lm", oracle_dir))


def test_processes_that_cannot_join(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: object) -> None:
        raise torch.distributed.DistNetworkError("gloo: connectFullMesh failed\nmore")

    monkeypatch.setattr(processes, "PartialState", fail)
    with pytest.raises(RuntimeError):
        processes.state()
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(
        UserError, match=r"cannot connect to each other \(gloo: connectFullMesh failed\).*GLOO_SOCKET_IFNAME"
    ):
        processes.state()


def test_signals_kill_only_while_processes_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training asks how many there are again and again; a signal that comes just then must not end it unsaved."""
    seen: list[object] = []

    def ask(**_: object) -> SimpleNamespace:
        seen.append(signal.getsignal(signal.SIGTERM))
        return SimpleNamespace(num_processes=2)

    monkeypatch.setattr(processes, "PartialState", ask)
    monkeypatch.setattr(processes, "_group", None)
    monkeypatch.setattr(processes, "_gloo_group", lambda: "joined")
    monkeypatch.setenv("WORLD_SIZE", "2")
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        ours = signal.getsignal(signal.SIGTERM)
        processes.state()
        processes.state()
        assert seen == [signal.SIG_DFL, ours] and signal.getsignal(signal.SIGTERM) is ours
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_batch_that_is_too_small_for_the_processes(data: Path) -> None:
    run = oracle_run(Path("x"), data)
    task = build_task(run)
    with pytest.raises(UserError, match="smaller than processes x accumulation .3 x 3"):
        TrainLoader(task.source(str(data), "train"), task, run.data, batch_size=8, seed=0, accumulate=3, world=3)


# ---------------------------------------------------------------- signals


def slow(started: str, *arguments: str) -> None:
    """The command line, with steps of 3 s and evaluation without end; the file `started` appears when either begins."""
    plain = OracleStage.step

    def step(*given):
        Path(started).touch()
        time.sleep(3)
        return plain(*given)

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
    process = start_ranks(2, "tests.test_processes:slow", *slow_run)
    wait_for((tmp_path / "started").exists)
    os.killpg(process.pid, signal.SIGTERM)
    said = finish(process)
    assert len(re.findall("stopped by signal 15 after step .; saved", said)) == 1, said
    assert said[: said.find("torch/distributed")].count("Traceback") == 0, said
    assert len(ckpt.checkpoints(tmp_path / "run")) == 1
    assert not list((tmp_path / "run" / "checkpoints").glob(".tmp*"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_to_a_run_and_its_loaders(tmp_path: Path, slow_run: list[str], number: signal.Signals) -> None:
    process = start_alone("tests.test_processes:slow", *slow_run)
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
def test_a_signal_to_an_evaluation_and_its_loaders(tmp_path: Path, oracle_dir: Path, number: signal.Signals) -> None:
    arguments = [str(tmp_path / "started"), "evaluate", str(oracle_dir), "eval.workers=2", "eval.batch_size=1"]
    process = start_alone("tests.test_processes:slow", *arguments)
    wait_for((tmp_path / "started").exists)
    os.killpg(process.pid, number)
    said = finish(process)
    # The first line says that it has begun.
    assert process.returncode == 128 + number and len(said.strip().splitlines()) == 2, said


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
    assert lines(tmp_path / "run") == lines(whole)


def test_a_lost_connection_after_a_signal_is_the_signal(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The process that waits in C++ for those that a signal ends during evaluation."""
    received: list[StopSignals] = []
    plain = StopSignals.at_once
    monkeypatch.setattr(StopSignals, "at_once", lambda self: received.append(self) or plain(self))

    def evaluate(*_: object, **__: object) -> None:
        if signalled:
            received[-1].number = signal.SIGTERM
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(Trainer, "evaluate", evaluate)
    for signalled, kind in ((True, Interrupted), (False, RuntimeError)):
        with pytest.raises(kind):
            fit_run(oracle_run(tmp_path / kind.__name__, data, "train.steps=3"))
        said = "during the evaluation of step 3; saved" in capsys.readouterr().out
        assert said == signalled


def test_signals_are_noted_and_the_second_interrupt_acts(monkeypatch: pytest.MonkeyPatch) -> None:
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
    plain = OracleStage.step

    def step(*given):
        os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGKILL)
        time.sleep(60)
        return plain(*given)

    monkeypatch.setattr(OracleStage, "step", step)
    with pytest.raises(UserError, match="a loader process has died .*lower data.workers"):
        fit_run(oracle_run(tmp_path / "run", data, "data.workers=2"))
