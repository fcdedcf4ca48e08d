"""The output folder of `uvim-fsq predict`: file names, planned before anything is predicted, and the index.

Only results of earlier calls are ever replaced, never other files or the images to be predicted.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import shutil
import tempfile
import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from uvim_fsq.data.sample import Array
from uvim_fsq.errors import UserError
from uvim_fsq.files import check_folder, read_json_lines, write_json, writing
from uvim_fsq.tasks.base import Task

INDEX = "predictions.json"
#: Entries since the index was written last, one a line; the results of a process that was killed.
JOURNAL = ".predictions.jsonl"
#: Folders in which results are completed: what `tempfile` adds to the prefix. A killed process leaves one.
TEMPORARY, LEFTOVER = ".predict-", re.compile(r"\.predict-[a-z0-9_]{8}")
#: Longest file name of results without suffix, in bytes; the rest of 255 is for suffixes and for writing them.
MAX_STEM = 200

#: An image in the index: `image`; the path of each written file by its kind, or `error`; `stamp`, which changes with
#: the image's file; the predictor's provenance, whose `settings` change with everything that changes predictions.
Entry = dict[str, str]
NO_FILES = ("image", "error", "checkpoint", "decoding", "overrides", "decoding_from", "tiles", "settings", "stamp")


def _canonical(name: str) -> str:
    """Equal for names that some file systems treat as the same file."""
    return unicodedata.normalize("NFC", name).casefold()


def _identity(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError:  # a broken link
        found = path.lstat()
    return found.st_dev, found.st_ino


def stamp_of(files: Iterable[Path]) -> str:
    """A text that changes when one of the files is changed: sizes and times of modification, hashed if many."""
    found = [f"{about.st_size} {about.st_mtime_ns}" for about in (file.stat() for file in files)]
    return found[0] if len(found) == 1 else hashlib.sha256("\n".join(found).encode()).hexdigest()[:16]


def is_of(entry: Entry, file: Path) -> bool:
    """Whether an entry is about a file or a frame of it, by whatever path."""
    image = entry["image"]
    for name in (image, image.rpartition("#")[0]):
        with suppress(OSError, ValueError):
            if name == str(file) or (name and _identity(Path(name)) == _identity(file)):
                return True
    return False


class PredictionFolder:
    """The existing contents of `out` and the planned results. Removes what a killed call left half done.

    Args:
        out: the folder; it need not exist.
        task: its `prediction_files` gives the names of the files to be written.
        files: the images to predict. Results of earlier calls in `out` are skipped, unless they are in `named`.
        named: paths that the user gave explicitly, as opposed to files found in a folder.
        provenance: what each entry says in addition.
        resume: leave out images that have complete results with the same `settings` in their provenance.
        others: further files that must not be replaced.

    Attributes:
        images: all images, without duplicates.
        files: the images to predict: those that are not in `done`.
        done: image -> entry of its complete results.
        stems: image -> file name of its results, without suffix.

    Raises UserError if a result would replace a file that is not an earlier result.
    """

    def __init__(
        self,
        out: Path,
        task: Task,
        files: Iterable[Path],
        named: Collection[Path],
        *,
        provenance: Entry | None = None,
        resume: bool = False,
        others: Iterable[Path] = (),
    ) -> None:
        self.out, self.task, self.provenance, self.resume = out, task, provenance or {}, resume
        check_folder(out)
        for place in out.glob(f"{TEMPORARY}*"):
            if LEFTOVER.fullmatch(place.name):
                shutil.rmtree(place, ignore_errors=True)
        self.index = _read_index(out)
        self._by_image = {entry["image"]: entry for entry in self.index}
        self.earlier = {name for entry in self.index for name in _file_names(entry)}
        self._owners = {_canonical(name): entry for entry in self.index for name in _file_names(entry)}
        kept = self.without_results(files, named)
        self._inputs = {_identity(file): file for file in reversed(kept)}
        self.images = [file for file in dict.fromkeys(kept) if self._inputs[_identity(file)] == file]
        self._inputs |= {_identity(file): file for file in others}
        found = {file: self.finished(str(file), [file]) for file in self.images}
        self.done = {file: entry for file, entry in found.items() if entry is not None}
        self._taken = {_canonical(name) for entry in self.done.values() for name in _file_names(entry)}
        self._taken.add(_canonical(INDEX))
        self._reserved: dict[str, set[str]] = {}
        self.files = [file for file in self.images if file not in self.done]
        self.stems = {file: self.choose_stem(file, self._planned) for file in self.files}

    def without_results(self, files: Iterable[Path], named: Collection[Path]) -> list[Path]:
        """The files except results of earlier calls, finished or not, unless these are in `named`.

        Raises UserError if none is left.
        """
        results = {_identity(self.out / name) for name in self.earlier if (self.out / name).exists()}
        files, named = list(files), set(named)
        kept = [file for file in files if file in named or not (_is_leftover(file) or _identity(file) in results)]
        if files and not kept:
            raise UserError(f"the pictures are all results of an earlier predict in {self.out}; give other pictures")
        return kept

    def finished(self, image: str, sources: Iterable[Path]) -> Entry | None:
        """The entry of an image's complete results with the same settings, if they need not be made again."""
        entry = self._by_image.get(image)
        if not self.resume or entry is None or "error" in entry:
            return None
        names = _file_names(entry)
        if not names or not all((self.out / name).is_file() for name in names):
            return None
        try:
            stamp = stamp_of(sources)
        except OSError:  # e.g. a link that leads nowhere now
            return None
        return (
            entry
            if (entry.get("settings", ""), entry.get("stamp")) == (self.provenance.get("settings"), stamp)
            else None
        )

    def choose_stem(
        self, file: Path, planned: Callable[[str], list[str]], own: Callable[[Entry], bool] | None = None
    ) -> str:
        """Reserves file names for the results of a file: those that `planned` gives for the returned stem.

        Results of earlier calls are replaced only if they are the file's own, by `own` or else by `is_of`.
        """
        own = own or functools.partial(is_of, file=file)
        for stem in _candidate_stems(file):
            names = planned(stem)
            owners = [self._owners.get(_canonical(name)) for name in names if (self.out / name).exists()]
            if self._taken.isdisjoint(map(_canonical, names)) and all(owner is None or own(owner) for owner in owners):
                break
        for name in names:
            self._claim(name)
        self._reserved.setdefault(stem, set()).update(names)
        return stem

    def reserve(self, stem: str, holder: str) -> None:
        """Reserves file names for the results of a frame, unless they are reserved for the stem `holder` already."""
        names = set(self._planned(stem))
        for name in names - self._reserved[holder]:
            self._claim(name)
        self._reserved[stem] = names

    def hold(self, entry: Entry, holder: str) -> None:
        """Reserves the file names of a frame's complete results likewise."""
        for name in set(_file_names(entry)) - self._reserved[holder]:
            self._claim(name)

    def _planned(self, stem: str) -> list[str]:
        return [Path(path).name for path in self.task.prediction_files(stem).values()]

    def _claim(self, name: str) -> None:
        """Reserves a file name for this call. Raises UserError if it is not available."""
        target = self.out / name
        if _canonical(name) in self._taken:
            raise UserError(f"{target} would be written twice; predict these pictures into different folders")
        if target.exists():
            if _identity(target) in self._inputs:
                raise UserError(f"a result would replace {target}, a picture to predict; choose another --out")
            if name not in self.earlier:
                raise UserError(
                    f"{target} already exists and is not a result of an earlier predict; "
                    "choose another --out or move it"
                )
        self._taken.add(_canonical(name))

    def save(self, file: Path, prediction: Any, image: Array) -> Entry:
        """Writes all results of one image, or none of them. Raises UserError if writing fails."""
        return self.write(str(file), [file], self.stems[file], functools.partial(self._save, prediction, image))

    def save_frame(self, film: Path, image: str, stem: str, prediction: Any, pixels: Array) -> Entry:
        """Likewise for one frame of a film; `image` is its name in the index."""
        return self.write(image, [film], stem, functools.partial(self._save, prediction, pixels))

    def _save(self, prediction: Any, image: Array, stem: str) -> dict[str, str]:
        return self.task.save_prediction(prediction, image, stem)

    def write(self, image: str, sources: Iterable[Path], stem: str, save: Callable[[str], dict[str, str]]) -> Entry:
        """Writes all results of one image, or none of them.

        Args:
            image: its name in the index.
            sources: the files that it was read from.
            stem: the file name of its results; what `save` writes in addition to its reserved names is reserved here.
            save: writes the files that begin with the path it is given and returns kind -> path.

        Returns the entry. Raises UserError if writing fails.
        """
        with writing(self.out / stem):
            stamp = stamp_of(sources)
            self.out.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=self.out) as temporary:
                try:
                    paths = save(str(Path(temporary) / stem))
                except UserError as error:
                    raise UserError(str(error).replace(temporary, str(self.out))) from error
                written = sorted(Path(temporary).iterdir())
                for path in written:
                    if path.name not in self._reserved[stem]:
                        self._claim(path.name)
                files = {kind: str(self.out / Path(path).name) for kind, path in paths.items()}
                entry = {"image": image, **files, **self.provenance, "stamp": stamp}
                # If this process is killed between two of these steps, results of two calls are never mixed, and the
                # next call knows the files as results.
                for path in written:
                    (self.out / path.name).unlink(missing_ok=True)
                self._note(entry)
                for path in written:
                    path.replace(self.out / path.name)
        return entry

    def _note(self, entry: Entry) -> None:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        with open(os.open(self.out / JOURNAL, flags, 0o666), "wb") as file:
            # A line of its own even if the last one was cut off.
            file.write(b"\n" + json.dumps(entry).encode() + b"\n")

    def write_index(self, entries: Sequence[Entry]) -> None:
        """Writes the index: `entries` and results of earlier calls that still exist. Raises UserError if that fails."""
        new = {_canonical(name) for entry in entries for name in _file_names(entry)}
        kept = [entry for entry in self.index if (names := _file_names(entry)) and self._still_valid(names, new)]
        write_json(self.out / INDEX, [*kept, *entries])
        with writing(self.out):
            (self.out / JOURNAL).unlink(missing_ok=True)

    def _still_valid(self, names: list[str], new: set[str]) -> bool:
        return all((self.out / name).is_file() and _canonical(name) not in new for name in names)


def _candidate_stems(file: Path) -> Iterator[str]:
    """Names for an image's results, in order of preference: its own, prefixed with its folder's, then numbered."""
    yield _shortened(file.stem)
    stem = _shortened(f"{file.absolute().parent.name}_{file.stem}")
    yield stem
    number = 2
    while True:
        yield f"{stem}-{number}"
        number += 1


def _shortened(stem: str) -> str:
    """A stem of at most `MAX_STEM` bytes: itself, or its beginning and a hash."""
    name = os.fsencode(stem)
    if len(name) <= MAX_STEM:
        return stem
    return f"{name[: MAX_STEM - 9].decode(errors='ignore')}-{hashlib.sha256(name).hexdigest()[:8]}"


def _is_leftover(file: Path) -> bool:
    """Whether a file lies in a folder in which a killed call was completing results."""
    return any(LEFTOVER.fullmatch(part) for part in file.parent.parts)


def _file_names(entry: Entry) -> list[str]:
    return [Path(path).name for kind, path in entry.items() if kind not in NO_FILES]


def _read_index(out: Path) -> list[Entry]:
    """The entries of the index and of the journal; of those that name the same file, the last."""
    file, entries = out / INDEX, []
    if file.exists():
        try:
            entries = json.loads(file.read_bytes())
            sound = all(isinstance(value, str) for entry in entries for value in (entry["image"], *entry.values()))
        except (OSError, ValueError, RecursionError, TypeError, KeyError, AttributeError):
            sound = False
        if not sound:
            raise UserError(f"{file} is damaged or not a list of predictions; choose another --out or remove it")
    journal = read_json_lines(out / JOURNAL)
    entries = [*entries, *(e for e in journal if "image" in e and all(isinstance(v, str) for v in e.values()))]
    if not journal:
        return entries
    last = {name: number for number, entry in enumerate(entries) for name in _file_names(entry)}
    return [entry for i, entry in enumerate(entries) if all(last[name] == i for name in _file_names(entry))]
