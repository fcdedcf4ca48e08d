"""Files that are written whole or not at all, and read with one clear line where they are damaged.

Knows nothing of what the files mean.
"""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from uvim_fsq.errors import UserError

#: How libraries that swallow the error number say that the disk is full: Rust (safetensors), the C library (h5py),
#: torch.save, and NumPy, which writes "1000 requested and 512 written" or asks beforehand.
_FULL = (
    "No space left",
    "Disk quota",
    "errno = 28",
    "PytorchStreamWriter failed",
    "enforce fail",
    " requested and ",
    "Not enough free space",
)
#: How a cell begins that spreadsheets take for a formula.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def disk_is_full(error: BaseException) -> bool:
    """Whether an error that a library raised while writing, or a UserError made of it, means that no space is left, or
    none of the quota."""
    if isinstance(error, UserError):
        return error.__cause__ is not None and disk_is_full(error.__cause__)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    # safetensors' own error, which derives from none of these, known by its name so that nothing is imported here.
    swallowed = isinstance(error, (OSError, RuntimeError, ValueError)) or type(error).__name__ == "SafetensorError"
    return swallowed and any(words in str(error) for words in _FULL)


@contextmanager
def writing(what: str | Path) -> Iterator[None]:
    """Turns an error that the user can put right (full disk, a file where a folder should be, no permission) into a
    UserError that names `what`, a file or folder."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if disk_is_full(error):
            raise UserError(f"cannot write {what}: the disk is full; free space, or choose another place") from error
        if isinstance(error, OSError):
            reason = error.strerror or str(error).splitlines()[0]
            raise UserError(f"cannot write {what}: {reason}; choose another place") from error
        raise


def check_folder(folder: Path, what: Path | None = None) -> None:
    """Raises UserError, naming `what` or the folder, unless files can be made in `folder`, which need not exist.

    For the start of a command: better now than after hours of work.
    """
    with writing(what or folder):
        place = folder
        while not place.exists():
            place = place.parent
        # Made, not asked about: a superuser is told that everything is allowed, under /proc too.
        os.rmdir(tempfile.mkdtemp(prefix=".uvim_fsq_", dir=place))


def check_file(file: Path) -> None:
    """Raises UserError unless `file` can be written or replaced."""
    with writing(file):
        if file.is_dir():
            raise UserError(f"cannot write {file}: it is a folder; name a file in it")
        special = _is_special(file)
    if not special:
        check_folder(file.parent, file)


def _is_special(file: Path) -> bool:
    """Whether a path is a device or a pipe, such as /dev/stdout, which is written as it is and never replaced."""
    if file.is_symlink() and file.absolute().parts[1:2] not in (("dev",), ("proc",)):
        return False  # somebody's link to a disk, say; it is replaced
    return file.exists() and not file.is_file() and not file.is_dir()


def sync(path: Path) -> None:
    """Has the kernel put a file, or the names in a folder, onto the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(file: Path, write: Callable[[Path], object], *, durable: bool = True) -> None:
    """Makes a file whole or not at all: `write(path)` gets another name beside it. Folders are made.

    `durable=False` spares the wait for the disk: for the many files of a cache, which can be made again.

    Raises UserError naming the file when the disk is full or the place cannot be written.
    """
    if _is_special(file):
        with writing(file):
            write(file)
        return
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    with writing(file):
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            partial.unlink(missing_ok=True)  # it may be a link that somebody put there
            write(partial)
            if durable:
                sync(partial)
            partial.replace(file)
            if durable:
                sync(file.parent)
        finally:
            # A folder on the way may be a file, or not writable: the error under way says so.
            with suppress(OSError):
                partial.unlink(missing_ok=True)


def write_text(file: Path, text: str) -> None:
    """`write_whole` for text, in UTF-8."""
    write_whole(file, lambda path: path.write_text(text, encoding="utf-8"))


def write_json(file: Path, value: Any, indent: int | None = 2) -> None:
    """`write_whole` for what `json` can write."""
    write_text(file, json.dumps(value, indent=indent) + "\n")


def write_csv(file: Path, rows: Iterable[Sequence[Any]]) -> None:
    """`write_whole` for a table. Text that a spreadsheet would run as a formula gets an apostrophe; numbers stay."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    for row in rows:
        writer.writerow([f"'{cell}" if isinstance(cell, str) and cell[:1] in _FORMULA else cell for cell in row])
    write_whole(file, lambda path: path.write_bytes(text.getvalue().encode(errors="surrogateescape")))


def _refuse_outside(folder: Path, link: Path, target: str) -> None:
    real = os.path.realpath(folder)
    if os.path.commonpath([real, target]) != real:
        raise UserError(f"{link} is a link that leads out of {folder}, to {target}; remove it, or copy that here")


def inside(folder: Path, file: Path) -> Path:
    """`file`, if its folder lies in `folder` also when all links on the way are followed.

    For writing at places that somebody else may have prepared. Raises UserError naming the link's target.
    """
    _refuse_outside(folder, file.parent, os.path.realpath(file.parent))
    return file


def refuse_links(folder: Path) -> None:
    """Raises UserError for a link anywhere in `folder` that leads out of it: what is written or deleted there may be
    somebody's own."""
    for place, folders, files in os.walk(folder):
        for entry in (Path(place, name) for name in (*folders, *files)):
            if entry.is_symlink():
                _refuse_outside(folder, entry, os.path.realpath(entry))


def read_json(file: Path, remedy: str) -> dict[str, Any]:
    """The object in a JSON file that this package wrote.

    Raises UserError, ending with `remedy`, for a file that is damaged or holds anything but an object, and
    FileNotFoundError where there is none.
    """
    try:
        value = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} is damaged ({' '.join(str(error).split())}); {remedy}") from error
    if not isinstance(value, dict):
        raise UserError(f"{file} is damaged (it holds no object); {remedy}")
    return value


def read_json_lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a file that holds one a line; none if there is no such file.

    Damaged lines are left out with a warning; a last line that a kill cut off, without a word.

    Raises UserError for a file that cannot be read.
    """
    try:
        lines = file.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error
    found = [_object(line) for line in lines]
    damaged = [number for number, value in enumerate(found[:-1], 1) if value is None and lines[number - 1].strip()]
    if damaged:
        warnings.warn(f"{file}: {len(damaged)} damaged line(s) left out, the first is {damaged[0]}", stacklevel=2)
    return [value for value in found if value is not None]


def _object(text: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
