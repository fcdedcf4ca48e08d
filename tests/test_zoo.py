"""`tools/make_zoo.sh`: the files of a release."""

from __future__ import annotations

import hashlib
import os
import subprocess
import tarfile
from pathlib import Path

from tests.support.paths import ROOT


def make_zoo(tmp_path: Path, *pairs: str) -> subprocess.CompletedProcess[str]:
    """Runs the script with a stand-in for `uvim-fsq push RUN NAME --license L --folder FOLDER`, which copies RUN."""
    commands = tmp_path / "bin"
    commands.mkdir(exist_ok=True)
    (commands / "uvim-fsq").write_text('#!/bin/sh\n[ "$4 $5 $6" = "--license mit --folder" ] && cp -r "$2" "$7"\n')
    (commands / "uvim-fsq").chmod(0o755)
    script = [str(ROOT / "tools" / "make_zoo.sh"), "zoo", "mit", *pairs]
    environment = {**os.environ, "PATH": f"{commands}:{os.environ['PATH']}"}
    return subprocess.run(script, cwd=tmp_path, env=environment, capture_output=True, text=True)


def test_each_run_becomes_an_archive_that_depends_on_its_content_alone(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "lm"
    (run / "oracle").mkdir(parents=True)
    (run / "weights").write_bytes(b"weights")
    (run / "oracle" / "weights").write_bytes(b"others")
    (run / "weights").chmod(0o600)
    done = make_zoo(tmp_path, "depth_1=runs/lm", "other=runs/lm")
    assert done.returncode == 0, done.stderr
    archive = tmp_path / "zoo" / "depth_1.tar"
    with tarfile.open(archive) as files:
        assert files.getnames() == ["depth_1", "depth_1/oracle", "depth_1/oracle/weights", "depth_1/weights"]
        assert {(item.mtime, item.uid) for item in files} == {(0, 0)}
    first = hashlib.sha256(archive.read_bytes()).hexdigest()
    assert (tmp_path / "zoo" / "SHA256SUMS").read_text().splitlines()[0] == f"{first}  depth_1.tar"
    os.utime(run / "weights", (1, 1))
    (run / "weights").chmod(0o644)
    assert make_zoo(tmp_path, "depth_1=runs/lm").returncode == 0
    assert hashlib.sha256(archive.read_bytes()).hexdigest() == first


def test_a_run_that_cannot_be_packed_leaves_no_archive(tmp_path: Path) -> None:
    assert make_zoo(tmp_path, "a=runs/none").returncode != 0
    assert list((tmp_path / "zoo").iterdir()) == []
    wrong = make_zoo(tmp_path, "../a=runs")
    assert wrong.returncode == 2 and "give NAME=RUN" in wrong.stderr
