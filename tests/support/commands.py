"""Starts commands in processes of their own."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys

from tests.support.paths import ROOT


def interruptible() -> None:
    """In a new process: Ctrl-C ends it, also where a shell runs the tests in the background and ignores it for them."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def command(*arguments: str, limit: int | None = None) -> subprocess.Popen[str]:
    """`uvim-fsq` in a process group of its own, with files of at most `limit` bytes."""

    def start() -> None:
        os.setsid()
        interruptible()
        if limit is not None:
            # Simulates a full disk without a file system of its own; only the error number differs.
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
