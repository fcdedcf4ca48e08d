"""The folder that `uvim-fsq predict` fills: who is written where, planned before anything is predicted, and the index.

Nothing but results of an earlier call is ever replaced, and least of all a picture that is to be predicted.
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

#: A picture of the index: `image`, the kinds of files written or `error`, and what the prediction was made with.
Entry = dict[str, str]
NO_FILES = ("image", "error", "checkpoint", "overrides")


def _same_name(name: str) -> str:
    """Two names with the same value are one file on some file system."""
    return unicodedata.normalize("NFC", name).casefold()


def _identity(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError:  # a link that leads nowhere
        found = path.lstat()
    return found.st_dev, found.st_ino


class PredictionFolder:
    """`out` as it is and as it will be.

    Args:
        out: need not exist.
        task: says by `prediction_files` what it will write.
        files: the pictures to predict. Results that an earlier call wrote into `out` are left out, unless they are
            among those `named` by the user: they only happen to lie in a folder that was named.

    `files` are those left, each once. Raises UserError where a result would replace anything but an earlier result.
    """

    def __init__(self, out: Path, task: Task, files: Iterable[Path], named: Collection[Path]) -> None:
        self.out, self.task = out, task
        check_folder(out)
        self.index = _read_index(out / INDEX)
        self.earlier = {name for entry in self.index for name in _names(entry)}
        results = {_identity(out / name) for name in self.earlier if (out / name).exists()}
        kept = [file for file in files if file in named or _identity(file) not in results]
        if not kept:
            raise UserError(f"nothing but results of an earlier predict in {out}; name other pictures")
        self._inputs = {_identity(file): file for file in reversed(kept)}
        self.files = [file for file in dict.fromkeys(kept) if self._inputs[_identity(file)] == file]
        self._taken = {_same_name(INDEX)}
        self.stems = {file: self._plan(file) for file in self.files}

    def _plan(self, file: Path) -> str:
        for stem in _stems(file):
            names = self._planned(stem)
            if self._taken.isdisjoint(map(_same_name, names)):
                break
        for name in names:
            self._claim(name)
        return stem

    def _planned(self, stem: str) -> list[str]:
        return [Path(path).name for path in self.task.prediction_files(stem).values()]

    def _claim(self, name: str) -> None:
        """Takes a name for this call, once and for all."""
        target = self.out / name
        if _same_name(name) in self._taken:
            raise UserError(f"{target} would be written twice; predict these pictures into different folders")
        if target.exists():
            if _identity(target) in self._inputs:
                raise UserError(f"a result would replace {target}, a picture to predict; choose another --out")
            if name not in self.earlier:
                raise UserError(
                    f"{target} is there already and no result of an earlier predict; choose another --out or move it"
                )
        self._taken.add(_same_name(name))

    def save(self, file: Path, prediction: Any, image: Array) -> Entry:
        """Writes all results of one picture, or none. Raises UserError where that fails."""
        stem = self.stems[file]
        planned = set(self._planned(stem))
        with writing(self.out / stem):
            self.out.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".predict-", dir=self.out) as fresh:
                try:
                    paths = self.task.save_prediction(prediction, image, str(Path(fresh) / stem))
                except UserError as error:
                    raise UserError(str(error).replace(fresh, str(self.out))) from error
                written = sorted(Path(fresh).iterdir())
                for path in written:
                    if path.name not in planned:
                        self._claim(path.name)
                for path in written:
                    path.replace(self.out / path.name)
        return {"image": str(file), **{kind: str(self.out / Path(path).name) for kind, path in paths.items()}}

    def write_index(self, entries: Sequence[Entry]) -> None:
        """Lists `entries`, and what earlier calls wrote and is still there. Raises UserError where that fails."""
        new = {_same_name(name) for entry in entries for name in _names(entry)}
        kept = [entry for entry in self.index if (names := _names(entry)) and self._kept(names, new)]
        write_json(self.out / INDEX, [*kept, *entries])

    def _kept(self, names: list[str], new: set[str]) -> bool:
        return all((self.out / name).is_file() and _same_name(name) not in new for name in names)


def _stems(file: Path) -> Iterator[str]:
    """Names for a picture's results, the first that is free is taken: its own, its folder's in front, numbers."""
    yield file.stem
    stem = f"{file.absolute().parent.name}_{file.stem}"
    yield stem
    number = 2
    while True:
        yield f"{stem}-{number}"
        number += 1


def _names(entry: Entry) -> list[str]:
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
    raise UserError(f"{file} is damaged or no list of predictions; choose another --out or remove it")
