"""Rendering in several processes, and what ends it early: a signal, a killed worker, a full disk."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from uvim_fsq.commands.data_check import check_data
from uvim_fsq.data.pool import in_processes
from uvim_fsq.errors import UserError
from uvim_fsq.files import disk_is_full
from uvim_fsq.synthetic.writers import write_dataset

ROOT = Path(__file__).resolve().parents[1]


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


def test_results_come_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert list(in_processes(square, range(50), 3)) == [i * i for i in range(50)]
    assert list(in_processes(threads, range(2), 2)) == ["1", "1"] and os.environ["OMP_NUM_THREADS"] == "3"
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_a_killed_worker_is_an_error() -> None:
    """The pool of before waited for ever."""
    results, got = in_processes(killed_at_20, range(1000), 2), []
    with pytest.raises(UserError, match=r"a worker process died \(signal 9\).*fewer workers"):
        got += results
    assert got == list(range(16))[: len(got)]


def test_an_error_of_a_worker_is_raised_here() -> None:
    with pytest.raises(OSError, match="No space left") as caught:
        list(in_processes(full_at_20, range(1000), 2))
    assert disk_is_full(caught.value)


def command(*arguments: str, limit: int | None = None) -> subprocess.Popen[str]:
    """`uvim-fsq` in a process group of its own, with files of at most `limit` bytes."""

    def start() -> None:
        os.setsid()
        if limit is not None:
            # The one way to a full disk that needs no file system of one's own; the error has another number.
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.Popen(
        [sys.executable, "-m", "uvim_fsq", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=start,
    )


def synth(out: Path, *arguments: str, limit: int | None = None, workers: int = 2) -> subprocess.Popen[str]:
    size = ["--size", "24x32", "--num-val", "2", "--workers", str(workers)]
    return command("synth", *size, *arguments, "--out", str(out), limit=limit)


def group_is_gone(process: subprocess.Popen[str]) -> bool:
    """Within a minute, as orphans notice that nobody reads their results."""
    for _ in range(600):
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_signal_ends_it_and_clears_up(tmp_path: Path, number: signal.Signals, code: int) -> None:
    """Sent to the whole group, as a terminal and `timeout` do, while pictures are made; SIGKILL to the parent alone."""
    process = synth(tmp_path / "set", "--format", "imagenet", "--num", "1000000")
    while not list(tmp_path.glob(".set.*/train/*/*.JPEG")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    (process.kill if number == signal.SIGKILL else lambda: os.killpg(process.pid, number))()
    _, said = process.communicate(timeout=120)
    assert process.returncode == code and group_is_gone(process), said
    assert "Traceback" not in said and not (tmp_path / "set").exists()
    assert number == signal.SIGKILL or not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("kind", "layout", "limit", "workers"),
    [
        ("nyu", "h5", 700, 1),
        ("nyu", "mat", 700, 1),
        ("nyu", "mat", 70_000, 2),
        ("coco_panoptic", "h5", 700, 2),
        ("imagenet", "h5", 700, 1),
    ],
)
def test_no_room_on_the_disk(tmp_path: Path, kind: str, layout: str, limit: int, workers: int) -> None:
    """HDF5 ended the process with a segmentation fault, and Pillow left half pictures in silence."""
    arguments = ["--format", kind, "--layout", layout, "--num", "40"]
    process = synth(tmp_path / "set", *arguments, limit=limit, workers=workers)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 2, (process.returncode, said)
    assert said.strip().splitlines()[-1].startswith(f"error: cannot write {tmp_path / 'set'}: File too large")
    assert "Traceback" not in said and not list(tmp_path.iterdir())


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("mount") is None, reason="needs a file system of its own")
@pytest.mark.parametrize("layout", ["h5", "mat"])
def test_a_disk_that_fills_up(tmp_path: Path, layout: str) -> None:
    place = tmp_path / "small"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", place]).returncode:
        pytest.skip("may not mount")
    try:
        process = synth(place / "set", "--format", "nyu", "--layout", layout, "--num", "400")
        _, said = process.communicate(timeout=300)
        assert process.returncode == 2 and "Traceback" not in said and "the disk is full" in said, said
        assert not list(place.iterdir())
    finally:
        subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize(("kind", "task"), [("nyu", "nyu_depth"), ("coco_panoptic", "coco_panoptic")])
def test_no_room_for_prepared_files(tmp_path: Path, kind: str, task: str) -> None:
    """What was made before stays, and the rest is made when there is room."""
    write_dataset(kind, tmp_path / "set", 3, (24, 32), num_val=1, layout="png", workers=1)
    prepare = ["data", "prepare", str(tmp_path / "set"), "--task", task]
    for limit, code, message in ((100, 2, "error: cannot write"), (None, 0, "")):
        process = command(*prepare, limit=limit)
        _, said = process.communicate(timeout=300)
        assert process.returncode == code and "Traceback" not in said and message in said
        assert not list(tmp_path.rglob("*.partial"))
    lines, ok = check_data(task, str(tmp_path / "set"))
    assert ok and sum("prepared" in line for line in lines) == 2
