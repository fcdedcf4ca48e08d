"""The output folder of `uvim-fsq predict`: file names, planned before anything is predicted, and the index.

Only results of earlier calls are ever replaced, never other files or the images to be predicted.
"""

from __future__ import annotations

import json
import tempfile
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from uvim_fsq.data.sample import Array
from uvim_fsq.errors import UserError
from uvim_fsq.files import check_folder, write_json, writing
from uvim_fsq.tasks.base import Task

INDEX = "predictions.json"

#: An image in the index: `image`; the path of each written file by its kind, or `error`; the predictor's provenance.
Entry = dict[str, str]
NO_FILES = ("image", "error", "checkpoint", "overrides", "decoding_from")


def _canonical(name: str) -> str:
    """Equal for names that some file systems treat as the same file."""
    return unicodedata.normalize("NFC", name).casefold()


def _identity(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError:  # a broken link
        found = path.lstat()
    return found.st_dev, found.st_ino


class PredictionFolder:
    """The existing contents of `out` and the planned results.

    Args:
        out: the folder; it need not exist.
        task: its `prediction_files` gives the names of the files to be written.
        files: the images to predict. Results of earlier calls in `out` are skipped, unless they are in `named`.
        named: paths that the user gave explicitly, as opposed to files found in a folder.

    Attributes:
        files: the images that remain, without duplicates.
        stems: image -> file name of its results, without suffix.

    Raises UserError if a result would replace a file that is not an earlier result.
    """

    def __init__(self, out: Path, task: Task, files: Iterable[Path], named: Collection[Path]) -> None:
        self.out, self.task = out, task
        check_folder(out)
        self.index = _read_index(out / INDEX)
        self.earlier = {name for entry in self.index for name in _file_names(entry)}
        results = {_identity(out / name) for name in self.earlier if (out / name).exists()}
        kept = [file for file in files if file in named or _identity(file) not in results]
        if not kept:
            raise UserError(f"the pictures are all results of an earlier predict in {out}; give other pictures")
        self._inputs = {_identity(file): file for file in reversed(kept)}
        self.files = [file for file in dict.fromkeys(kept) if self._inputs[_identity(file)] == file]
        self._taken = {_canonical(INDEX)}
        self.stems = {file: self._choose_stem(file) for file in self.files}

    def _choose_stem(self, file: Path) -> str:
        for stem in _candidate_stems(file):
            names = self._planned(stem)
            if self._taken.isdisjoint(map(_canonical, names)):
                break
        for name in names:
            self._claim(name)
        return stem

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
        stem = self.stems[file]
        planned = set(self._planned(stem))
        with writing(self.out / stem):
            self.out.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".predict-", dir=self.out) as temporary:
                try:
                    paths = self.task.save_prediction(prediction, image, str(Path(temporary) / stem))
                except UserError as error:
                    raise UserError(str(error).replace(temporary, str(self.out))) from error
                written = sorted(Path(temporary).iterdir())
                for path in written:
                    if path.name not in planned:
                        self._claim(path.name)
                for path in written:
                    path.replace(self.out / path.name)
        return {"image": str(file), **{kind: str(self.out / Path(path).name) for kind, path in paths.items()}}

    def write_index(self, entries: Sequence[Entry]) -> None:
        """Writes the index: `entries` and results of earlier calls that still exist. Raises UserError if that fails."""
        new = {_canonical(name) for entry in entries for name in _file_names(entry)}
        kept = [entry for entry in self.index if (names := _file_names(entry)) and self._still_valid(names, new)]
        write_json(self.out / INDEX, [*kept, *entries])

    def _still_valid(self, names: list[str], new: set[str]) -> bool:
        return all((self.out / name).is_file() and _canonical(name) not in new for name in names)


def _candidate_stems(file: Path) -> Iterator[str]:
    """Names for an image's results, in order of preference: its own, prefixed with its folder's, then numbered."""
    yield file.stem
    stem = f"{file.absolute().parent.name}_{file.stem}"
    yield stem
    number = 2
    while True:
        yield f"{stem}-{number}"
        number += 1


def _file_names(entry: Entry) -> list[str]:
    return [Path(path).name for kind, path in entry.items() if kind not in NO_FILES]


def _read_index(file: Path) -> list[Entry]:
    if not file.exists():
        return []
    try:
        entries = json.loads(file.read_bytes())
        if all(isinstance(value, str) for entry in entries for value in (entry["image"], *entry.values())):
            return list(entries)
    except (OSError, ValueError, RecursionError, TypeError, KeyError, AttributeError):
        pass
    raise UserError(f"{file} is damaged or not a list of predictions; choose another --out or remove it")
