"""Running a grid: shared oracles, failing cells, restarts, devices per cell."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.grids import write_grid
from uvim_fsq.errors import UserError
from uvim_fsq.evaluation.results import result_file
from uvim_fsq.experiments.ablation.devices import visible_devices
from uvim_fsq.experiments.ablation.grid import Cell, Training, plan, read_grid
from uvim_fsq.experiments.ablation.runner import Runner


def test_results_that_share_no_table_do_not_stop_the_grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = plan(read_grid(write_grid(tmp_path, rows={"A": {}, "B": {"lm": {"train.steps": 4}}})), tmp_path / "out")
    lines: list[str] = []

    def refuse(failures: object) -> None:
        raise UserError("their figures cannot stand in one table")

    monkeypatch.setattr(Runner, "_run_command", lambda *_: None)
    runner = Runner(tmp_path / "out", 1, (), lines.append, refuse)
    runner.run(cells)
    assert [line for line in lines if line.endswith(": done")] == ["A, seed 3: done", "B, seed 3: done"]
    assert lines.count("no table: their figures cannot stand in one table") == 2


def test_every_cell_gets_one_of_the_users_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert visible_devices({}, 2) == ("0", "1")
    assert visible_devices({"CUDA_VISIBLE_DEVICES": "5, 2"}, 2) == ("5", "2")
    assert visible_devices({"CUDA_VISIBLE_DEVICES": "GPU-8f3a,MIG-77"}, 2) == ("GPU-8f3a", "MIG-77")
    # CUDA ignores everything after an invalid entry.
    assert visible_devices({"CUDA_VISIBLE_DEVICES": "3,-1,4"}, 1) == ("3",)
    assert visible_devices({"CUDA_VISIBLE_DEVICES": ""}, 0) == ()
    rows = {str(i): {"oracle": {"optim.lr": 0.001 * (i + 1)}} for i in range(4)}
    cells = plan(read_grid(write_grid(tmp_path, rows=rows)), tmp_path / "out")
    started: list[dict[str, str]] = []

    class Process:
        def __init__(self, *_: object, env: dict[str, str], **__: object) -> None:
            started.append(env)

        def wait(self) -> int:
            return 0

    monkeypatch.setattr("uvim_fsq.experiments.ablation.runner.subprocess.Popen", Process)
    Runner(tmp_path / "out", 1, ("5", "GPU-8f3a"), lambda _: None).run(cells)
    assert [env["CUDA_VISIBLE_DEVICES"] for env in started] == ["5"] * 8
    started.clear()
    Runner(tmp_path / "out", 2, ("5", "GPU-8f3a"), lambda _: None).run(cells)
    assert {env["CUDA_VISIBLE_DEVICES"] for env in started} == {"5", "GPU-8f3a"}
    started.clear()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    Runner(tmp_path / "out", 2, (), lambda _: None).run(cells)
    assert {env["CUDA_VISIBLE_DEVICES"] for env in started} == {""}


#: How long a test waits for another thread before it fails, in seconds.
PATIENCE = 20


def sharing(out: Path, *rows: str) -> list[Cell]:
    """Cells that share models: "soft" evaluates the LM of "hard", "tuned" tunes it first, "small" has an LM of its own
    on the same oracle, and "direct" shares nothing.
    """

    def training(stage: str, folder: str) -> Training:
        run: Any = SimpleNamespace(stage=stage)
        return Training(run, out / folder, (f"train-{stage}",))

    oracle, lm = training("oracle", "oracle"), training("lm", "lm")
    file = result_file(lm.folder)
    cells = (
        Cell("hard", 3, (oracle, lm), file),
        Cell("soft", 3, (oracle, lm), lm.folder / "soft.json", (("evaluate",),)),
        Cell("tuned", 3, (oracle, lm), lm.folder / "tuned.json", (("tune",), ("evaluate",))),
        Cell("small", 3, (oracle, training("lm", "small")), result_file(out / "small")),
        Cell("direct", 3, (training("direct", "direct"),), result_file(out / "direct")),
    )
    return [cell for row in rows for cell in cells if cell.row == row]


def write_result(training: Training, source: Path) -> None:
    training.folder.mkdir(parents=True)
    shutil.copy(result_file(source), result_file(training.folder))


class Commands:
    """A runner of such cells whose commands are functions, in place of processes.

    Attributes:
        during: the first word of a command -> what it does and returns.
        ran: the first words of the commands in the order of their starts.
        lines: what the runner said.
        after: the failures after each cell.
        waiting: is set when a job begins to wait.
    """

    def __init__(self, out: Path, monkeypatch: pytest.MonkeyPatch, jobs: int, *rows: str) -> None:
        self.cells = sharing(out, *rows)
        self.during: dict[str, Callable[[], str | None]] = {}
        self.ran: list[str] = []
        self.lines: list[str] = []
        self.after: list[dict[str, str]] = []
        self.waiting = threading.Event()
        self.runner = Runner(out, jobs, (), self.lines.append, lambda failures: self.after.append({**failures}))
        wait = self.runner._changed.wait
        monkeypatch.setattr(self.runner, "_run_command", self._run_command)
        monkeypatch.setattr(self.runner._changed, "wait", lambda: (self.waiting.set(), wait()))

    def _run_command(self, command: Sequence[str], run_dir: Path) -> str | None:
        self.ran.append(command[0])
        return self.during.get(command[0], lambda: None)()

    def run(self) -> None:
        self.runner.run(self.cells)

    def job_waits(self) -> None:
        assert self.waiting.wait(PATIENCE), "no job waits"

    def stop(self, number: signal.Signals) -> None:
        # Again, because Python may miss a signal that comes just before the main thread begins to wait.
        for _ in range(4):
            os.kill(os.getpid(), number)
            if self.runner._stopped.wait(PATIENCE / 4):
                return
        raise AssertionError("the runner did not stop")


def test_a_job_takes_another_cell_while_the_shared_model_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands, free_cell_runs = Commands(tmp_path, monkeypatch, 2, "hard", "soft", "small", "direct"), threading.Event()
    seen: list[bool] = []
    commands.during["train-oracle"] = lambda: seen.append(free_cell_runs.wait(PATIENCE))
    commands.during["train-direct"] = free_cell_runs.set
    commands.run()
    assert seen == [True], "the direct baseline started only after the oracle that it does not need"
    assert sorted(commands.ran) == ["evaluate", "train-direct", "train-lm", "train-lm", "train-oracle"]
    assert sorted(line for line in commands.lines if line.endswith("done")) == sorted(
        f"{cell.name}: done" for cell in commands.cells
    )


def test_one_job_runs_the_steps_in_the_order_of_the_grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = Commands(tmp_path, monkeypatch, 1, "hard", "soft", "small", "direct")
    commands.run()
    assert commands.lines == [
        "hard, seed 3: training the oracle",
        "hard, seed 3: training the lm",
        "hard, seed 3: done",
        "soft, seed 3: evaluation",
        "soft, seed 3: done",
        "small, seed 3: training the lm",
        "small, seed 3: done",
        "direct, seed 3: training the direct baseline",
        "direct, seed 3: done",
    ]
    assert commands.after == [{}] * 4


def test_a_job_waits_for_a_shared_model_and_then_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands, both = Commands(tmp_path, monkeypatch, 2, "hard", "small"), threading.Barrier(2)

    def train_lm() -> None:
        both.wait(PATIENCE)

    commands.during = {"train-oracle": commands.job_waits, "train-lm": train_lm}
    commands.run()
    assert commands.ran == ["train-oracle", "train-lm", "train-lm"], "both jobs train an LM after the oracle"


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_training_that_fails_is_tried_once_and_fails_every_cell_that_needs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: int
) -> None:
    commands = Commands(tmp_path, monkeypatch, jobs, "hard", "soft", "small", "direct")
    commands.during["train-oracle"] = lambda: "out of memory (x.log)"
    commands.run()
    assert sorted(commands.ran) == ["train-direct", "train-oracle"]
    why = "training the oracle: out of memory (x.log)"
    failed = [f"{name}, seed 3" for name in ("hard", "soft", "small")]
    assert commands.runner.failures == dict.fromkeys(failed, why)
    assert [line for line in commands.lines if "FAILED" in line] == [f"{name}: FAILED, {why}" for name in failed]
    assert len(commands.after) == 4 and sorted(map(len, commands.after))[-1] == 3
    assert "direct, seed 3: done" in commands.lines


def test_a_failed_evaluation_does_not_fail_the_cell_whose_lm_it_uses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = Commands(tmp_path, monkeypatch, 1, "soft", "hard")
    commands.during["evaluate"] = lambda: "no such split (x.log)"
    commands.run()
    assert commands.runner.failures == {"soft, seed 3": "evaluation: no such split (x.log)"}
    assert "hard, seed 3: done" in commands.lines and commands.ran == ["train-oracle", "train-lm", "evaluate"]


def test_a_result_counts_only_if_its_process_succeeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lm_dir: Path
) -> None:
    commands = Commands(tmp_path, monkeypatch, 2, "hard", "small")

    def write_and_fail() -> str:
        commands.job_waits()
        write_result(commands.cells[0].trainings[0], lm_dir)
        commands.waiting.clear()
        with commands.runner._changed:
            commands.runner._changed.notify_all()
        commands.job_waits()  # although it looked again
        return "disk full"

    commands.during["train-oracle"] = write_and_fail
    commands.run()
    assert commands.ran == ["train-oracle"] and len(commands.runner.failures) == 2


def test_finished_steps_are_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lm_dir: Path) -> None:
    commands = Commands(tmp_path, monkeypatch, 1, "soft", "hard")
    for training in commands.cells[0].trainings:
        write_result(training, lm_dir)
    commands.run()
    # What has ended is reported at once.
    assert commands.lines == ["hard, seed 3: done", "soft, seed 3: evaluation", "soft, seed 3: done"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_waiting_jobs_and_starts_nothing_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    commands = Commands(tmp_path, monkeypatch, 2, "hard", "small")

    def stopped() -> str:
        commands.job_waits()
        commands.stop(number)
        return "stopped by a signal"

    def handler(*_: object) -> None: ...

    commands.during["train-oracle"] = stopped
    before = signal.signal(number, handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            commands.run()
        assert signal.getsignal(number) is handler
    finally:
        signal.signal(number, before)
    assert commands.ran == ["train-oracle"] and commands.runner.failures == {} and commands.after == []
    assert commands.lines == ["hard, seed 3: training the oracle"]


def test_a_stopped_evaluation_does_not_start_its_next_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = Commands(tmp_path, monkeypatch, 1, "tuned")

    commands.during["tune"] = lambda: commands.stop(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        commands.run()
    assert commands.ran == ["train-oracle", "train-lm", "tune"]


def test_an_unexpected_error_ends_the_grid_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = Commands(tmp_path, monkeypatch, 2, "hard", "direct", "small")

    def until_stopped() -> None:
        assert commands.runner._stopped.wait(PATIENCE), "the other job's error came to nothing"

    def broken() -> str:
        raise OSError("no space left")

    commands.during = {"train-oracle": until_stopped, "train-direct": broken}
    with pytest.raises(OSError, match="no space left"):
        commands.run()
    assert sorted(commands.ran) == ["train-direct", "train-oracle"]


@pytest.mark.parametrize(
    ("output", "said"),
    [("loading\nno such file\n\n", "no such file ({log})"), ("", "exit code 7 ({log})")],
)
def test_a_failed_process_is_reported_by_the_last_line_of_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str, said: str
) -> None:
    cells = plan(read_grid(write_grid(tmp_path, rows={"A": {}})), tmp_path / "out")
    environments: list[dict[str, str]] = []

    class Process:
        def __init__(self, _: object, stdout: Any, env: dict[str, str], **__: object) -> None:
            environments.append(env)
            stdout.write(output)

        def wait(self) -> int:
            return 7

    monkeypatch.setattr("uvim_fsq.experiments.ablation.runner.subprocess.Popen", Process)
    monkeypatch.setattr("uvim_fsq.experiments.ablation.runner.os.cpu_count", lambda: 6)
    runner = Runner(tmp_path / "out", 2, (), lambda _: None)
    runner.run(cells)
    log = tmp_path / "out" / "logs" / f"{cells[0].trainings[0].folder.name}.log"
    assert runner.failures == {"A, seed 3": f"training the oracle: {said.format(log=log)}"}
    assert environments[0]["OMP_NUM_THREADS"] == "3", "the jobs share the cores"
    assert not runner._running and runner._devices.qsize() == 2


@pytest.mark.parametrize(("jobs", "cores", "threads"), [(2, 6, "3"), (4, 2, "1"), (2, None, "1"), (1, 6, "the user's")])
def test_several_jobs_share_the_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: int, cores: int | None, threads: str
) -> None:
    seen: list[str] = []

    class Process:
        def __init__(self, _: object, env: dict[str, str], **__: object) -> None:
            seen.append(env["OMP_NUM_THREADS"])

        def wait(self) -> int:
            return 0

    monkeypatch.setenv("OMP_NUM_THREADS", "the user's")
    monkeypatch.setattr("uvim_fsq.experiments.ablation.runner.subprocess.Popen", Process)
    monkeypatch.setattr("uvim_fsq.experiments.ablation.runner.os.cpu_count", lambda: cores)
    Runner(tmp_path / "out", jobs, (), lambda _: None).run(sharing(tmp_path, "direct"))
    assert seen == [threads]


def test_a_process_that_starts_while_the_grid_stops_is_terminated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminated: list[bool] = []

    class Process:
        def __init__(self, *_: object, **__: object) -> None:
            runner._stopped.set()

        def terminate(self) -> None:
            terminated.append(True)

        def wait(self) -> int:
            return 0

    monkeypatch.setattr("uvim_fsq.experiments.ablation.runner.subprocess.Popen", Process)
    runner = Runner(tmp_path / "out", 1, (), lambda _: None)
    runner._run_command(("train-oracle",), tmp_path / "oracle")
    assert terminated == [True]


def test_an_error_in_one_job_terminates_the_processes_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminated, started = threading.Event(), threading.Event()

    class Process:
        def __init__(self, program: Sequence[str], **_: object) -> None:
            if program[-1] == "train-direct":
                assert started.wait(PATIENCE)
                raise OSError("no more processes")

        def terminate(self) -> None:
            terminated.set()

        def wait(self) -> int:
            started.set()
            return 0 if terminated.wait(PATIENCE) else 1

    monkeypatch.setattr("uvim_fsq.experiments.ablation.runner.subprocess.Popen", Process)
    with pytest.raises(OSError, match="no more processes"):
        Runner(tmp_path / "out", 2, (), lambda _: None).run(sharing(tmp_path, "hard", "direct"))
    assert terminated.is_set()
