"""Trains the cells of a grid in parallel, each stage in its own process. An interrupted grid can be continued."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from uvim_fsq.errors import UserError
from uvim_fsq.evaluation.results import finished
from uvim_fsq.experiments.ablation.grid import Cell

#: An entry of `Cell.steps`.
Step = tuple[str, Path, Path, Sequence[Sequence[str]]]


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


class Runner:
    """Trains cells, `jobs` stages at a time, each in its own process.

    Attributes:
        failures: cell name -> the last line of its process's output.
    """

    def __init__(
        self,
        out: Path,
        jobs: int,
        devices: Sequence[str],
        say: Callable[[str], None],
        after_cell: Callable[[Mapping[str, str]], object] = lambda failures: None,
    ) -> None:
        """Args:
        out: folder of the grid; logs are written to its subfolder "logs".
        jobs: number of processes at a time.
        devices: values of CUDA_VISIBLE_DEVICES, assigned to the jobs in turn; may be empty.
        say: gets a line for each event.
        after_cell: gets `failures` after each cell.
        """
        self.out, self.say, self.jobs = out, say, jobs
        self.failures: dict[str, str] = {}
        self._after_cell, self._after_cell_lock = after_cell, threading.Lock()
        self._devices: queue.Queue[str] = queue.Queue()
        for i in range(jobs):
            self._devices.put(devices[i % len(devices)] if devices else "")
        self._open: list[Cell] = []
        self._busy: set[Path] = set()  # run directories that a job works on
        self._done: set[Path] = set()  # result files
        self._errors: dict[Path, str] = {}  # result file -> why there is none
        self._changed = threading.Condition()  # guards the four, notified when a step ends
        self._stopped = threading.Event()
        self._running: set[subprocess.Popen[bytes]] = set()

    def run(self, cells: Sequence[Cell]) -> None:
        """Trains all unfinished cells. A cell that fails does not stop the others.

        A free job takes the first cell, in the order given, whose next step no other job works on: cells share models,
        which are trained once. A training that fails is not tried again; all cells that need it fail.

        On Ctrl-C or SIGTERM the running processes save a checkpoint and exit, and no new ones are started.
        """
        self._open = list(cells)
        # Set SIGINT too: shells let background jobs ignore it.
        before = {number: signal.signal(number, _interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            with ThreadPoolExecutor(self.jobs) as pool:
                try:
                    for job in as_completed([pool.submit(self._job) for _ in range(self.jobs)]):
                        job.result()
                except BaseException:
                    with self._changed:
                        self._stopped.set()
                        self._changed.notify_all()
                    for process in list(self._running):
                        process.terminate()
                    raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _job(self) -> None:
        while taken := self._take():
            cell, step = taken
            if step is None or step[2] in self._errors:
                self._end(cell, step)
            else:
                self._run_step(cell, step)

    def _take(self) -> tuple[Cell, Step | None] | None:
        """Waits for a cell that has ended, i.e. has no next step or one that failed, else for a step that can be run.

        Returns the cell and its next step, or None if nothing is left to do.
        """
        with self._changed:
            while self._open and not self._stopped.is_set():
                free = None
                for cell in self._open:
                    step = next((step for step in cell.steps if not self._is_done(step)), None)
                    if step is None or step[2] in self._errors:
                        self._open.remove(cell)
                        return cell, step
                    if free is None and step[1] not in self._busy:
                        free = cell, step
                if free is not None:
                    self._busy.add(free[1][1])
                    return free
                self._changed.wait()
        return None

    def _is_done(self, step: Step) -> bool:
        _, folder, file, _ = step
        # What a process writes does not count before it exits, nor if it fails.
        ended = folder not in self._busy and file not in self._errors
        return file in self._done or (ended and finished(folder, file))

    def _run_step(self, cell: Cell, step: Step) -> None:
        name, folder, file, commands = step
        self.say(f"{cell.name}: {name}")
        results = (self._run_command(command, folder) for command in commands if not self._stopped.is_set())
        error = next(filter(None, results), None)
        with self._changed:
            if error is None:
                self._done.add(file)
            else:
                self._errors[file] = f"{name}: {error}"
            self._busy.discard(folder)
            self._changed.notify_all()

    def _end(self, cell: Cell, failed: Step | None) -> None:
        if failed is None:
            self.say(f"{cell.name}: done")
        else:
            self.failures[cell.name] = self._errors[failed[2]]
            self.say(f"{cell.name}: FAILED, {self.failures[cell.name]}")
        with self._after_cell_lock:
            try:
                self._after_cell(self.failures)
            except UserError as error:
                # The tables can be written later; training continues.
                self.say(f"no table: {error}")

    def _run_command(self, command: Sequence[str], run_dir: Path) -> str | None:
        """Runs a command in a process of its own. Returns None, or the last line that it printed if it failed."""
        log = self.out / "logs" / f"{run_dir.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        device = self._devices.get()
        environment = {**os.environ}
        if device:
            environment["CUDA_VISIBLE_DEVICES"] = device
        elif self.jobs > 1:
            environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // self.jobs))
        try:
            with log.open("w") as file:
                program = [sys.executable, "-m", "uvim_fsq", *command]
                process = subprocess.Popen(program, stdout=file, stderr=subprocess.STDOUT, env=environment)
                self._running.add(process)
                if self._stopped.is_set():
                    process.terminate()
                code = process.wait()
                self._running.discard(process)
        finally:
            self._devices.put(device)
        if code == 0:
            return None
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        return f"{lines[-1] if lines else f'exit code {code}'} ({log})"
