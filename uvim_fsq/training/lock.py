"""One training per run directory: a lock that the kernel takes back when the process dies."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from uvim_fsq.errors import UserError
from uvim_fsq.files import writing

LOCK = ".lock"


@contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """Holds the lock of a run directory, which is made if there is none.

    Raises UserError where another process holds it. On a file system without locks it warns and goes on.
    """
    file = run_dir / LOCK
    with writing(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            # A lock of this process alone: loader workers, which may outlive it for seconds, do not inherit it.
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                holder = os.read(handle, 200).decode(errors="replace").strip() or "another process"
                raise UserError(
                    f"{run_dir} is being trained by {holder}; wait for its end, or choose another train.out"
                ) from None
            warnings.warn(
                f"{run_dir} lies on a file system without locks ({error.strerror}): see to it that nothing else "
                "trains there",
                stacklevel=3,
            )
        else:
            os.truncate(handle, 0)
            os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield
    finally:
        os.close(handle)
