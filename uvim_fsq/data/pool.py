"""Maps a function over many jobs in several processes, with results in order. Independent of what the jobs are."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from uvim_fsq.errors import UserError

#: Jobs per message, and messages in flight per process (two, so that none is ever idle).
BUNDLE, AHEAD = 8, 2


def in_processes(function: Callable[[Any], Any], jobs: Sequence[Any], workers: int) -> Generator[Any]:
    """Yields function(job) for every job, in order.

    Processes are spawned, so `function` must be importable by name. With one worker, this process does the work. An
    exception in `function` is raised here. The workers ignore SIGINT and SIGTERM, which this process handles, and they
    exit as soon as the iterator is closed or this process exits.

    Raises UserError if a worker dies.
    """
    if workers == 1:
        yield from map(function, jobs)
        return
    bundles = [jobs[i : i + BUNDLE] for i in range(0, len(jobs), BUNDLE)]
    processes: dict[Connection, BaseProcess] = {}
    try:
        _start(processes, function, min(workers, len(bundles)))
        yield from _in_order(processes, bundles)
    finally:
        for process in processes.values():
            process.kill()
        for connection, process in processes.items():
            process.join()
            connection.close()


def _start(processes: dict[Connection, BaseProcess], function: Callable[[Any], Any], workers: int) -> None:
    """Fills `processes`: our end of each worker's pipe -> the worker."""
    context = multiprocessing.get_context("spawn")
    with _worker_environment():
        # Start it now: if Process.start() started it, it would unblock the signals again.
        resource_tracker.ensure_running()
        with signals_blocked():
            for _ in range(workers):
                connection, worker_connection = context.Pipe()
                process = context.Process(target=_work, args=(worker_connection, function))
                process.start()
                processes[connection] = process
                worker_connection.close()  # otherwise the pipe would stay open when the worker exits


@contextmanager
def _worker_environment() -> Iterator[None]:
    """Sets the environment for processes started in the block: one thread each, since there is a process per core, and
    (from Python 3.11 on) a module path without the working directory.
    """
    changes = {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    previous = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in previous.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Blocks SIGINT and SIGTERM in this process and, from their first moment, in processes started in the block."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _in_order(processes: dict[Connection, BaseProcess], bundles: Sequence[Sequence[Any]]) -> Iterator[Any]:
    todo = iter(enumerate(bundles))
    pending: dict[Connection, deque[int]] = {connection: deque() for connection in processes}
    done: dict[int, list[Any]] = {}

    def send_next(connection: Connection) -> None:
        for number, bundle in todo:
            pending[connection].append(number)
            connection.send(bundle)
            return

    for connection in [*processes] * AHEAD:
        with _worker_alive(processes[connection]):
            send_next(connection)
    for number in range(len(bundles)):
        while number not in done:
            for connection in wait([connection for connection, numbers in pending.items() if numbers]):
                assert isinstance(connection, Connection)
                with _worker_alive(processes[connection]):
                    result = connection.recv()
                    if not isinstance(result, Exception):
                        send_next(connection)
                if isinstance(result, Exception):
                    raise result
                done[pending[connection].popleft()] = result
        yield from done.pop(number)


@contextmanager
def _worker_alive(process: BaseProcess) -> Iterator[None]:
    """Converts a closed pipe, which means that the worker has died, into a UserError."""
    try:
        yield
    except (EOFError, OSError) as error:
        process.join(timeout=60)
        code = process.exitcode or 0
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        raise UserError(
            f"a worker process died ({how}), perhaps out of memory; run it again with fewer workers"
        ) from error


def _work(connection: Connection, function: Callable[[Any], Any]) -> None:
    try:
        while True:
            connection.send(_results(function, connection.recv()))
    except (EOFError, OSError):
        pass  # the parent process is gone


def _results(function: Callable[[Any], Any], bundle: Sequence[Any]) -> list[Any] | Exception:
    try:
        return [function(job) for job in bundle]
    except Exception as error:
        return error
