"""Caches arrays that are slow to compute as .npz files. Independent of what they mean.

The cache never fails: if it cannot be read or written, the arrays are computed again. Since its content is trusted,
files and folders that belong to another user (in a shared /tmp, for example) are not used.
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
    """$UVIM_FSQ_CACHE, by default ~/.cache/uvim_fsq. The folder need not exist."""
    path = os.path.expanduser(os.environ.get("UVIM_FSQ_CACHE") or "~/.cache/uvim_fsq")
    # A container user without a home folder would otherwise get a folder named "~".
    return Path(tempfile.gettempdir(), f"uvim_fsq_{_user()}") if path.startswith("~") else Path(path)


def _user() -> int:
    """The user id; 0 on Windows, which has none."""
    return os.getuid() if hasattr(os, "getuid") else 0


def owned_by_user(path: Path) -> bool:
    """Whether a file or folder exists and belongs to the user; so must a link to it."""
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
    """The arrays that `make` returns, from the cache if possible.

    Args:
        kind: what the arrays are; the prefix of the file name.
        key: what they depend on: values that `json` can write, others are converted by `str`.
        make: computes them; arrays of numbers, bytes or fixed-width strings, no objects.
        fresh: whether arrays found in the cache are still valid.
        keep: whether newly computed arrays are worth storing.
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
    if not (owned_by_user(path.parent) and owned_by_user(path)):
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
        if not owned_by_user(path.parent):
            warnings.warn(f"{path.parent} belongs to another user, nothing is cached; set UVIM_FSQ_CACHE", stacklevel=2)
            return
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
        with os.fdopen(handle, "wb") as file:
            np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]
        os.replace(temporary, path)
    except OSError:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
