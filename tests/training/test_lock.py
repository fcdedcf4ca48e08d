"""One training at a time in a run directory."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path
from typing import Any

import pytest

from tests.support.runs import another_process, fit_run
from tests.support.small import oracle_run
from uvim_fsq.checkpoints.run_directory import checkpoints
from uvim_fsq.errors import UserError
from uvim_fsq.training import loop
from uvim_fsq.training.lock import run_lock
from uvim_fsq.training.signals import Interrupted


def test_a_second_training_in_a_run_directory_is_refused(tmp_path: Path, data: Path, quick_evaluation: None) -> None:
    out = tmp_path / "run"
    run = oracle_run(out, data, "train.steps=3")
    with another_process(out) as process:
        with pytest.raises(UserError, match=f"being trained by process {process.pid} on .*choose another train.out"):
            fit_run(run)
        assert not (out / "checkpoints").exists() and not (out / "metrics.jsonl").exists()
        process.kill()
        process.wait()
        fit_run(run)
    assert checkpoints(out)
    with another_process(out):
        pass


def test_the_lock_is_held_until_training_ends(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when training fails, and a loader process that outlives it does not hold it."""
    held: list[bool] = []
    ready, go_on = os.pipe()

    def training(*_: Any) -> None:
        if os.fork() == 0:
            os.close(go_on)
            os.read(ready, 1)  # until the test ends
            os._exit(0)
        pid = os.fork()
        if pid == 0:
            code = 1
            with contextlib.suppress(OSError):
                fcntl.lockf(os.open(tmp_path / "run" / ".lock", os.O_RDWR), fcntl.LOCK_EX | fcntl.LOCK_NB)
                code = 0
            os._exit(code)
        held.append(os.waitpid(pid, 0)[1] != 0)
        raise Interrupted(130)

    monkeypatch.setattr(loop, "_train", training)
    with pytest.raises(Interrupted):
        fit_run(oracle_run(tmp_path / "run", data))
    assert held == [True]
    with another_process(tmp_path / "run"):
        os.close(go_on)
        os.wait()


def test_a_file_system_without_locks_gives_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", none)
    with pytest.warns(UserWarning, match="without locks"), run_lock(tmp_path / "run"):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write .*file"), run_lock(tmp_path / "file"):
        pass
