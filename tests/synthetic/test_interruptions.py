"""Writing a synthetic data set ends early on signals and full disks, and leaves nothing behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.support.commands import command


def synth(out: Path, *arguments: str, limit: int | None = None, workers: int = 2) -> subprocess.Popen[str]:
    size = ["--size", "24x32", "--num-val", "2", "--workers", str(workers)]
    return command("synth", *size, *arguments, "--out", str(out), limit=limit)


def group_is_gone(process: subprocess.Popen[str]) -> bool:
    """Whether all processes of the group end within a minute."""
    for _ in range(600):
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_signal_ends_all_processes_and_removes_partial_files(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    """Signals go to the whole group, as from a terminal or `timeout`; SIGKILL goes to the parent only."""
    process = synth(tmp_path / "set", "--format", "imagenet", "--num", "1000000")
    while not list(tmp_path.glob(".set.*/train/*/*.JPEG")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    (process.kill if number == signal.SIGKILL else lambda: os.killpg(process.pid, number))()
    _, said = process.communicate(timeout=120)
    assert process.returncode == code and group_is_gone(process), said
    assert "Traceback" not in said and not (tmp_path / "set").exists()
    assert number == signal.SIGKILL or not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "layout", "limit", "workers"),
    [
        ("nyu", "h5", 700, 1),
        ("nyu", "mat", 700, 1),
        ("nyu", "mat", 70_000, 2),
        ("coco_panoptic", None, 700, 2),
        ("imagenet", None, 700, 1),
    ],
)
def test_a_write_error_is_one_line_and_leaves_nothing_behind(
    tmp_path: Path, kind: str, layout: str | None, limit: int, workers: int
) -> None:
    """HDF5 can crash in this case, and Pillow can leave truncated images without an error."""
    arguments = ["--format", kind, *(["--layout", layout] if layout else []), "--num", "40"]
    process = synth(tmp_path / "set", *arguments, limit=limit, workers=workers)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 2, (process.returncode, said)
    assert said.strip().splitlines()[-1].startswith(f"error: cannot write {tmp_path / 'set'}: File too large")
    assert "Traceback" not in said and not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("mount") is None, reason="needs a file system of its own")
@pytest.mark.parametrize("layout", ["h5", "mat"])
def test_a_full_disk_is_one_line_and_leaves_nothing_behind(tmp_path: Path, layout: str) -> None:
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
