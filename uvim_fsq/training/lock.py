"""A lock that allows only one training per run directory. The kernel releases it when the process dies."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from uvim_fsq.errors import UserError
from uvim_fsq.files import writing

LOCK = ".lock"


@contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """Holds the lock of a run directory, which is created if needed.

    Raises UserError if another process holds the lock. On a file system without locks it only warns.
    """
    file = run_dir / LOCK
    with writing(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            # A POSIX lock, because forked loader workers, which may outlive this process by seconds, do not inherit it.
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                holder = os.read(handle, 200).decode(errors="replace").strip() or "another process"
                raise UserError(
                    f"{run_dir} is being trained by {holder}; wait until it ends, or choose another train.out"
                ) from None
            warnings.warn(
                f"{run_dir} is on a file system without locks ({error.strerror}): make sure that nothing else "
                "trains there",
                stacklevel=3,
            )
        else:
            os.truncate(handle, 0)
            os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield
    finally:
        os.close(handle)


def is_held(run_dir: Path) -> bool:
    """Whether another process holds the lock of a run directory, without touching it."""
    try:
        handle = os.open(run_dir / LOCK, os.O_RDONLY)
    except OSError:
        return False
    try:
        # struct flock: type, whence, start, length, process. F_GETLK changes the type to F_UNLCK if nobody holds it.
        asked = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        answer = fcntl.fcntl(handle, fcntl.F_GETLK, asked)
        return struct.unpack("hhqqi4x", answer)[0] != fcntl.F_UNLCK
    except OSError:  # a file system without locks
        return False
    finally:
        os.close(handle)
