"""Starts real ranks on CPUs, through PyTorch's own launcher. Each of them checks how many there are.

`run_ranks(2, "cli", "evaluate", "runs/x")` runs the command line in two processes;
`run_ranks(2, "tests.test_x:work", "a", "b")` calls `work("a", "b")` in each.
"""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from tests.support.commands import interruptible
from tests.support.paths import ROOT

#: Seconds after which ranks count as hanging. Machines may be slow: what is meant to end takes seconds.
PATIENCE = 600


def start_ranks(
    count: int, target: str, *arguments: str, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> subprocess.Popen[str]:
    """Starts `count` ranks under the launcher; see `start`."""
    # The launcher finds a free port by itself: one that was free a moment ago may be another test's by now.
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(count), "--standalone"]
    launch += ["--local_addr", "127.0.0.1", "-m", "tests.support.ranks", str(count), target]
    return start([*launch, *arguments], env=env, cwd=cwd)


def start(
    command: Sequence[str], env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> subprocess.Popen[str]:
    """Starts a command in a session of its own, without a GPU; all that it says comes through one pipe."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    cpu = {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command,
        env={**os.environ, **cpu, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **(env or {})},
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=interruptible,
    )


def finish(process: subprocess.Popen[str], seconds: float = PATIENCE) -> str:
    """Waits for the ranks and returns what they said; ranks that hang are killed and fail the test."""
    try:
        said, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        kill(process)
        raise AssertionError(f"the ranks hang:\n{process.communicate()[0]}") from None
    return said


def kill(process: subprocess.Popen[str]) -> None:
    """Kills the launcher and all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def run_ranks(
    count: int, target: str, *arguments: str, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> str:
    """Runs `count` ranks to their good end and returns what they said. Fails the test if one of them fails."""
    process = start_ranks(count, target, *arguments, env=env, cwd=cwd)
    said = finish(process)
    assert process.returncode == 0, said
    assert said.count(f"[rank of {count}]") == count, said
    return said


def main() -> None:
    """What each rank runs: the target, then the check that it was one of `count`."""
    count, target, *arguments = sys.argv[1:]
    if target == "cli":
        from uvim_fsq.cli import main as target_function

        target_function(arguments)
    else:
        module, _, name = target.partition(":")
        getattr(importlib.import_module(module), name)(*arguments)

    import torch
    from accelerate.state import PartialState

    # What the code under test made of the launcher's variables; nothing here helps it.
    assert PartialState._shared_state, "no process group was asked for"
    assert PartialState().num_processes == int(count), f"{PartialState().num_processes} instead of {count} processes"
    print(f"[rank of {count}]", flush=True)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
