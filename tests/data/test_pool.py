"""Work in several processes: order, killed workers, errors."""

from __future__ import annotations

import os
import signal

import pytest

from uvim_fsq.data.pool import in_processes
from uvim_fsq.errors import UserError
from uvim_fsq.files import disk_is_full


def square(job: int) -> int:
    return job * job


def threads(job: int) -> str:
    return os.environ["OMP_NUM_THREADS"]


def killed_at_20(job: int) -> int:
    if job == 20:
        os.kill(os.getpid(), signal.SIGKILL)
    return job


def full_at_20(job: int) -> int:
    if job == 20:
        raise OSError(28, "No space left on device")
    return job


@pytest.mark.slow
def test_results_come_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert list(in_processes(square, range(50), 3)) == [i * i for i in range(50)]
    assert list(in_processes(threads, range(2), 2)) == ["1", "1"] and os.environ["OMP_NUM_THREADS"] == "3"
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_a_killed_worker_is_an_error() -> None:
    """A pool of the standard library would wait forever."""
    results, got = in_processes(killed_at_20, range(1000), 2), []
    with pytest.raises(UserError, match=r"a worker process died \(signal 9\).*fewer workers"):
        got += results
    assert got == list(range(16))[: len(got)]


def test_an_error_of_a_worker_is_raised_in_the_parent() -> None:
    with pytest.raises(OSError, match="No space left") as caught:
        list(in_processes(full_at_20, range(1000), 2))
    assert disk_is_full(caught.value)
