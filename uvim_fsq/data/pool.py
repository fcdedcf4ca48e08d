"""One function over many jobs in several processes, the results in order. Knows nothing of what the jobs are."""

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

#: Jobs that travel together; so many bundles wait at each process, so that none is ever idle.
BUNDLE, AHEAD = 8, 2


def in_processes(function: Callable[[Any], Any], jobs: Sequence[Any], workers: int) -> Generator[Any]:
    """Yields function(job) of every job, in order. Processes are spawned: `function` must be importable by name.

    An exception of `function` is raised here. Signals are this process's business: the workers take no notice of
    SIGINT and SIGTERM, and are gone as soon as the iterator is closed or this process has ended. With one worker it is
    this process that works.

    Raises UserError when a worker dies.
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
    """Fills `processes`: this process's end of each worker's pipe -> the worker."""
    context = multiprocessing.get_context("spawn")
    with _environment():
        # Its own start would unblock the signals again.
        resource_tracker.ensure_running()
        with _signals_blocked():
            for _ in range(workers):
                ours, theirs = context.Pipe()
                process = context.Process(target=_work, args=(theirs, function))
                process.start()
                processes[ours] = process
                theirs.close()  # else the end of the worker would not close the pipe


@contextmanager
def _environment() -> Iterator[None]:
    """What processes started in this block inherit: one thread each, as there is a process for every core, and (from
    Python 3.11 on) no look into the current folder before the installed packages."""
    changes = {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    earlier = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in earlier.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Processes started in this block take no signal from their first moment on."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _in_order(processes: dict[Connection, BaseProcess], bundles: Sequence[Sequence[Any]]) -> Iterator[Any]:
    todo = iter(enumerate(bundles))
    asked: dict[Connection, deque[int]] = {connection: deque() for connection in processes}
    done: dict[int, list[Any]] = {}

    def ask(connection: Connection) -> None:
        for number, bundle in todo:
            asked[connection].append(number)
            connection.send(bundle)
            return

    for connection in [*processes] * AHEAD:
        with _alive(processes[connection]):
            ask(connection)
    for number in range(len(bundles)):
        while number not in done:
            for connection in wait([connection for connection, numbers in asked.items() if numbers]):
                assert isinstance(connection, Connection)
                with _alive(processes[connection]):
                    result = connection.recv()
                    if not isinstance(result, Exception):
                        ask(connection)
                if isinstance(result, Exception):
                    raise result
                done[asked[connection].popleft()] = result
        yield from done.pop(number)


@contextmanager
def _alive(process: BaseProcess) -> Iterator[None]:
    """Around talking to a worker: the end of its pipe is the worker's end."""
    try:
        yield
    except (EOFError, OSError) as error:
        process.join(timeout=60)
        code = process.exitcode or 0
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        raise UserError(
            f"a worker process died ({how}), perhaps for lack of memory; run it again with fewer workers"
        ) from error


def _work(connection: Connection, function: Callable[[Any], Any]) -> None:
    try:
        while True:
            connection.send(_results(function, connection.recv()))
    except (EOFError, OSError):
        pass  # who asked is gone


def _results(function: Callable[[Any], Any], bundle: Sequence[Any]) -> list[Any] | Exception:
    try:
        return [function(job) for job in bundle]
    except Exception as error:
        return error
