"""Arrays that are slow to make, kept as .npz files between runs. Knows nothing of what they mean.

A cache never fails: where it cannot be read or written, the arrays are made anew. Since what lies in it is believed, it
is the user's alone: a folder of somebody else's (in a shared /tmp, say) is not used.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

Arrays = dict[str, np.ndarray]


def cache_dir() -> Path:
    """$UVIM_FSQ_CACHE, by default ~/.cache/uvim_fsq. It need not exist."""
    path = os.path.expanduser(os.environ.get("UVIM_FSQ_CACHE") or "~/.cache/uvim_fsq")
    # A container's user without a home would otherwise get a folder called "~".
    return Path(tempfile.gettempdir(), f"uvim_fsq_{_user()}") if path.startswith("~") else Path(path)


def _user() -> int:
    """The user's number; 0 where there are none (Windows)."""
    return os.getuid() if hasattr(os, "getuid") else 0


def _is_ours(path: Path) -> bool:
    """Whether a file or folder is there, and the user's own; a link must be, too."""
    try:
        owners = {path.stat().st_uid, path.lstat().st_uid}
    except OSError:
        return False
    return owners == {_user()}


def _always(arrays: Arrays) -> bool:
    return True


def cached_arrays(
    kind: str,
    key: Mapping[str, object],
    make: Callable[[], Arrays],
    fresh: Callable[[Arrays], bool] = _always,
    keep: Callable[[Arrays], bool] = _always,
) -> Arrays:
    """The arrays that `make` returns, from the cache if they are there.

    Args:
        kind: what they are; the beginning of the file's name.
        key: what they depend on; anything that `json` can write, or else its `str`.
        make: makes them; arrays of numbers, bytes or fixed-width strings, no objects.
        fresh: whether arrays found in the cache still hold.
        keep: whether new arrays are worth a file.
    """
    text = json.dumps(dict(key), sort_keys=True, default=str)
    path = cache_dir() / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:24]}.npz"
    found = _load(path)
    if found is not None and fresh(found):
        return found
    arrays = make()
    if keep(arrays):
        _store(path, arrays)
    return arrays


def _load(path: Path) -> Arrays | None:
    if not (_is_ours(path.parent) and _is_ours(path)):
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, KeyError, EOFError, AttributeError, MemoryError, zipfile.BadZipFile, zlib.error):
        return None


def _store(path: Path, arrays: Arrays) -> None:
    temporary: str | None = None
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _is_ours(path.parent):
            warnings.warn(
                f"{path.parent} belongs to another user, nothing is kept there; set UVIM_FSQ_CACHE", stacklevel=2
            )
            return
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
        with os.fdopen(handle, "wb") as file:
            np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]
        os.replace(temporary, path)
    except OSError:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
