"""Atomic file writes, and reads that report damaged files in one line. Independent of what the files mean."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from uvim_fsq.errors import UserError

#: "Disk full" in the messages of libraries that drop the error number: Rust (safetensors), the C library (h5py),
#: torch.save, and NumPy ("1000 requested and 512 written", or a check before it writes).
_DISK_FULL = (
    "No space left",
    "Disk quota",
    "errno = 28",
    "PytorchStreamWriter failed",
    "enforce fail at inline_container",
    " requested and ",
    "Not enough free space",
)
#: First characters of a cell that spreadsheets take for a formula.
_FORMULA_START = ("=", "+", "-", "@", "\t", "\r")


def disk_is_full(error: BaseException) -> bool:
    """Whether an error from a library's write, or a UserError caused by one, means a full disk or an exceeded quota."""
    if isinstance(error, UserError):
        return error.__cause__ is not None and disk_is_full(error.__cause__)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    # SafetensorError derives from none of these; it is matched by name to avoid the import.
    candidate = isinstance(error, (OSError, RuntimeError, ValueError)) or type(error).__name__ == "SafetensorError"
    return candidate and any(words in str(error) for words in _DISK_FULL)


@contextmanager
def writing(what: str | Path) -> Iterator[None]:
    """Converts write errors that the user can fix (full disk, no permission, a file where a folder should be) into a
    UserError that names `what`, a file or folder.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if disk_is_full(error):
            raise UserError(f"cannot write {what}: the disk is full; free space, or choose another path") from error
        if isinstance(error, OSError):
            reason = error.strerror or str(error).splitlines()[0]
            raise UserError(f"cannot write {what}: {reason}; choose another path") from error
        raise


def check_folder(folder: Path, what: str | Path | None = None) -> None:
    """Raises UserError, naming `what` or the folder, unless files can be created in `folder`, which need not exist yet.

    Called when a command starts, so that a bad path does not surface after hours of work.
    """
    with writing(what or folder):
        place = folder
        while not place.exists():
            place = place.parent
        # Try it: for a superuser, os.access allows everything, even under /proc.
        os.rmdir(tempfile.mkdtemp(prefix=".uvim_fsq_", dir=place))


def check_file(file: Path) -> None:
    """Raises UserError unless `file` can be written or replaced."""
    with writing(file):
        if file.is_dir():
            raise UserError(f"cannot write {file}: it is a folder; give the path of a file")
        special = _is_special(file)
    if not special:
        check_folder(file.parent, file)


def _is_special(file: Path) -> bool:
    """Whether a path is a device or a pipe, such as /dev/stdout, which is written in place and never replaced."""
    if file.is_symlink() and file.absolute().parts[1:2] not in (("dev",), ("proc",)):
        return False  # a link elsewhere to a device (a disk, say): the link is replaced
    return file.exists() and not file.is_file() and not file.is_dir()


def sync(path: Path) -> None:
    """Flushes a file, or the entries of a folder, to disk (fsync)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(file: Path, write: Callable[[Path], object], *, durable: bool = True) -> None:
    """Writes a file atomically: `write(path)` fills a temporary file next to it, which then replaces it.

    Parent folders are created. Devices and pipes are written directly.

    Args:
        write: writes the content to the path it is given.
        durable: wait until the file is on disk. False is faster, for files that can be recomputed (caches).

    Raises UserError naming the file when the disk is full or the path is not writable.
    """
    if _is_special(file):
        with writing(file):
            write(file)
        return
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    with writing(file):
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            partial.unlink(missing_ok=True)  # never write through a link that somebody planted under this name
            write(partial)
            if durable:
                sync(partial)
            partial.replace(file)
            if durable:
                sync(file.parent)
        finally:
            # If a parent is a file or not writable, the original error says so.
            with suppress(OSError):
                partial.unlink(missing_ok=True)


@contextmanager
def writing_folder(folder: Path, marker: str) -> Iterator[Path]:
    """A temporary folder next to `folder`, which takes its place after the block. Should the block fail, it is deleted,
    and what was there before is unchanged.

    Args:
        folder: need not exist. If it does, it is replaced only if it is empty or holds the file `marker`, the sign that
            it was written in the same way.
        marker: a file's name.

    Raises UserError naming the folder when it holds anything else, the disk is full or the path is not writable.
    """
    check_replaceable(folder, marker)
    check_folder(folder.absolute().parent, folder)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    with writing(folder):
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            yield partial
            for file in (*partial.iterdir(), partial):
                sync(file)
            old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
            if folder.exists():
                folder.rename(old)
            partial.rename(folder)
            sync(folder.parent)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def check_replaceable(folder: Path, marker: str) -> None:
    """Raises UserError for a folder that `writing_folder` would not replace."""
    if folder.is_symlink() or (folder.exists() and not (folder.is_dir() and _is_ours(folder, marker))):
        raise UserError(f"{folder} exists and holds no {marker}, so it is not replaced; give another folder")


def _is_ours(folder: Path, marker: str) -> bool:
    return (folder / marker).is_file() or not any(folder.iterdir())


def write_text(file: Path, text: str) -> None:
    """Writes text atomically, in UTF-8."""
    write_whole(file, lambda path: path.write_text(text, encoding="utf-8"))


def write_json(file: Path, value: Any, indent: int | None = 2) -> None:
    """Writes a JSON value atomically."""
    write_text(file, json.dumps(value, indent=indent) + "\n")


def write_csv(file: Path, rows: Iterable[Sequence[Any]]) -> None:
    """Writes a table atomically. Text that a spreadsheet would run as a formula gets a leading apostrophe."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    for row in rows:
        writer.writerow([f"'{cell}" if isinstance(cell, str) and cell[:1] in _FORMULA_START else cell for cell in row])
    write_whole(file, lambda path: path.write_bytes(text.getvalue().encode(errors="surrogateescape")))


def _refuse_outside(folder: Path, link: Path, target: str) -> None:
    real = os.path.realpath(folder)
    if os.path.commonpath([real, target]) != real:
        raise UserError(f"{link} is a link that leads out of {folder}, to {target}; replace it with a copy")


def inside(folder: Path, file: Path) -> Path:
    """Returns `file` if its parent, with all links resolved, lies in `folder`.

    For writing in folders that somebody else may have prepared. Raises UserError naming the link's target.
    """
    _refuse_outside(folder, file.parent, os.path.realpath(file.parent))
    return file


def refuse_links(folder: Path) -> None:
    """Raises UserError if any link in `folder` leads out of it: writing or deleting through it could touch other
    people's files.
    """
    for place, folders, files in os.walk(folder):
        for entry in (Path(place, name) for name in (*folders, *files)):
            if entry.is_symlink():
                _refuse_outside(folder, entry, os.path.realpath(entry))


def read_json(file: Path, remedy: str) -> dict[str, Any]:
    """Reads the object in a JSON file that this package wrote.

    Raises UserError, ending with `remedy`, if the file is damaged or holds anything but an object, and
    FileNotFoundError if there is no such file.
    """
    try:
        value = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} is damaged ({' '.join(str(error).split())}); {remedy}") from error
    if not isinstance(value, dict):
        raise UserError(f"{file} is damaged (not a JSON object); {remedy}")
    return value


def read_json_lines(file: Path, last: int | None = None) -> list[dict[str, Any]]:
    """Reads a file of one JSON object per line; an empty list if there is no such file.

    `last`: read only the lines within the last bytes of the file, this many.

    Damaged lines are skipped with a warning. A truncated last line, left by a killed process, is skipped silently.

    Raises UserError if the file cannot be read.
    """
    try:
        with file.open("rb") as source:
            start = max(0, source.seek(0, os.SEEK_END) - last) if last is not None else 0
            source.seek(start)
            lines = source.read().split(b"\n")[bool(start) :]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error
    found = [_object(line) for line in lines]
    damaged = [number for number, value in enumerate(found[:-1], 1) if value is None and lines[number - 1].strip()]
    if damaged:
        warnings.warn(f"{file}: skipped {len(damaged)} damaged line(s), the first is line {damaged[0]}", stacklevel=2)
    return [value for value in found if value is not None]


def _object(text: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
