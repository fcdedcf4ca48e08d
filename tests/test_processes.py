"""Joining other processes: launcher variables, lost connections, signals."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.support.ranks import finish, start
from tests.support.small import oracle_run
from uvim_fsq import processes
from uvim_fsq.cli import main
from uvim_fsq.errors import UserError
from uvim_fsq.evaluation.run import evaluate
from uvim_fsq.training.run import train
from uvim_fsq.training.step import make_accelerator


@pytest.mark.multi
def test_sigterm_ends_a_process_that_waits_for_others(tmp_path: Path) -> None:
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


def test_errors_of_lost_connections_are_recognized() -> None:
    other = processes._peer_failure
    gone = "[/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1"
    assert "has exited" in (other(RuntimeError(gone)) or "")
    assert "does not respond" in (other(RuntimeError("[gloo/x.cc] Timed out waiting 900000ms for recv")) or "")
    assert "has exited" in (other(torch.distributed.DistBackendError("NCCL error: remote process exited")) or "")
    assert other(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None and other(OSError("gloo")) is None


@pytest.mark.parametrize("variable", processes.UNSUPPORTED)
def test_unsupported_accelerate_settings_are_refused(
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


def test_world_size_without_a_launcher_is_refused(
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
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, "other launcher variables are missing"),
        ({"LOCAL_RANK": "0"}, "other launcher variables are missing .*MASTER_ADDR"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two is not a number of processes"),
    ],
)
def test_incomplete_launcher_variables_are_refused(oracle_dir: Path, variables: dict[str, str], message: str) -> None:
    """In a process of its own: here Accelerate's state is made already."""
    process = start([sys.executable, "-m", "uvim_fsq", "evaluate", str(oracle_dir)], env=variables)
    said = finish(process)
    assert process.returncode == 2 and re.fullmatch(f"(.*loading ...\n)?error: .*{message}.*\n", said), said


def test_processes_that_cannot_connect_name_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: object) -> None:
        raise torch.distributed.DistNetworkError("gloo: connectFullMesh failed\nmore")

    monkeypatch.setattr("accelerate.state.PartialState", fail)
    with pytest.raises(RuntimeError):
        processes.state()
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match=r"cannot connect to each other \(gloo: connectFullMesh failed\).*IFNAME"):
        processes.state()


def test_signal_handlers_are_restored_after_joining(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training asks how many there are again and again; a signal that comes just then must not end it unsaved."""
    seen: list[object] = []

    def ask(**_: object) -> SimpleNamespace:
        seen.append(signal.getsignal(signal.SIGTERM))
        return SimpleNamespace(num_processes=2)

    monkeypatch.setattr("accelerate.state.PartialState", ask)
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
