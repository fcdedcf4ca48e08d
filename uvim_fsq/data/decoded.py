"""Keeps decoded images and label maps on disk (`data.cache_dir`), so that every file is decoded only once.

Decoding takes most of the time of loading compressed files; reading pixels back takes a tenth of a millisecond. Each
array is a file of its own, named by a hash of everything that it depends on. The folder never makes loading fail: if an
array cannot be read or written, it is decoded again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from uvim_fsq.data.sample import Array, smallest_integer
from uvim_fsq.errors import UserError
from uvim_fsq.files import write_whole

#: Part of every name; to be increased when the decoding of any kind of file changes.
VERSION = 1
#: Bytes before the values: NumPy's name of their type and the shape, padded with blanks.
HEADER = 64
#: Bytes of the disk that are left free, for checkpoints and everything else that it holds.
RESERVE = 5 << 30
_folder: Path | None = None


@contextmanager
def keep_decoded(folder: str) -> Iterator[None]:
    """Within the block, `decoded` uses `folder`, or none if it is ""."""
    global _folder
    before, _folder = _folder, Path(folder) if folder else None
    try:
        yield
    finally:
        _folder = before


def decoded(file: Path, dtype: type[np.generic], how: object, make: Callable[[], Array]) -> Array:
    """The array that `make` returns, read from the folder if it is there, and otherwise written to it.

    Only `make` raises errors, such as those of a missing or damaged file.

    Args:
        file: what is decoded. With a new modification time or size, it counts as another file.
        dtype: of the array. int32 is stored in the smallest integer type that holds all values.
        how: whatever else the array depends on; a value that `json` can write.
        make: decodes the file.
    """
    if _folder is None:
        return make()
    try:
        stat = file.stat()
    except OSError:
        return make()
    key = json.dumps([VERSION, os.path.abspath(file), stat.st_size, stat.st_mtime_ns, how])
    name = hashlib.sha256(key.encode()).hexdigest()[:40]
    place = _folder / name[:2] / name[2:]
    array = _load(place, dtype)
    if array is None:
        array = make()
        assert array.dtype == dtype, (array.dtype, dtype)
        _store(_folder, place, array)
    return array


def _load(place: Path, dtype: type[np.generic]) -> Array | None:
    try:
        with place.open("rb", buffering=0) as file:
            stored, *shape = file.read(HEADER).decode().split()
            array = np.fromfile(file, np.dtype(stored))
        return array.reshape([int(n) for n in shape]).astype(dtype, copy=False)
    except (OSError, ValueError, TypeError, MemoryError):
        return None


def _store(folder: Path, place: Path, array: Array) -> None:
    if array.dtype == np.int32:
        array = array.astype(smallest_integer(int(array.min(initial=0)), int(array.max(initial=0))))
    header = " ".join([array.dtype.str, *map(str, array.shape)]).ljust(HEADER).encode()

    def write(path: Path) -> None:
        with path.open("wb", buffering=0) as file:
            file.write(header)
            array.tofile(file)

    problem = f"less than {RESERVE >> 30} GB are free"
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(folder).free >= RESERVE:
            write_whole(place, write, durable=False)
            return
    except (OSError, UserError) as error:
        cause = error.__cause__ or error
        problem = getattr(cause, "strerror", None) or str(cause)
    # The same text for every sample, so that it is shown only once.
    warnings.warn(f"data.cache_dir={folder}: {problem}; what is not there is decoded in every epoch", stacklevel=2)
