"""Trains the cells of a grid in parallel, each stage in its own process. An interrupted grid can be continued."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from uvim_fsq.errors import UserError
from uvim_fsq.evaluation.results import finished
from uvim_fsq.experiments.ablation.grid import Cell


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


class Runner:
    """Trains cells, `jobs` at a time, each stage in its own process.

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
        jobs: number of cells trained at a time.
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
        self._locks: dict[Path, threading.Lock] = {}
        self._stopped = threading.Event()
        self._running: set[subprocess.Popen[bytes]] = set()

    def run(self, cells: Sequence[Cell]) -> None:
        """Trains all unfinished cells. A cell that fails does not stop the others.

        On Ctrl-C or SIGTERM the running processes save a checkpoint and exit, and no new ones are started.
        """
        for cell in cells:
            for training in cell.trainings:
                self._locks.setdefault(training.folder, threading.Lock())
        # Set SIGINT too: shells let background jobs ignore it.
        before = {number: signal.signal(number, _interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            with ThreadPoolExecutor(self.jobs) as pool:
                try:
                    list(pool.map(self._cell, cells))
                except BaseException:
                    self._stopped.set()
                    for process in list(self._running):
                        process.terminate()
                    raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _cell(self, cell: Cell) -> None:
        if self._stopped.is_set():
            return
        if all(self._step(cell, *step) for step in cell.steps):
            self.say(f"{cell.name}: done")
        if self._stopped.is_set():
            return
        with self._after_cell_lock:
            try:
                self._after_cell(self.failures)
            except UserError as error:
                # The tables can be written later; training continues.
                self.say(f"no table: {error}")

    def _step(self, cell: Cell, name: str, folder: Path, file: Path, commands: Sequence[Sequence[str]]) -> bool:
        """Runs the commands of a step (see `Cell.steps`) unless its result exists. Returns whether it exists then."""
        # Cells share models: the first one trains them, the others wait.
        with self._locks[folder]:
            if finished(folder, file):
                return True
            self.say(f"{cell.name}: {name}")
            for command in commands:
                error = self._run_command(command, folder)
                if self._stopped.is_set():
                    return False
                if error is not None:
                    self.failures[cell.name] = f"{name}: {error}"
                    self.say(f"{cell.name}: FAILED, {name}: {error}")
                    return False
        return True

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
