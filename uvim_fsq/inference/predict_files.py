"""Predicts files and folders into a folder: pictures, films, and sequences of pictures as films.

H, W height and width of a picture.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from uvim_fsq.checkpoints.layout import is_export
from uvim_fsq.console import LINES, Bar, clock, printable, say
from uvim_fsq.data.folders import list_images
from uvim_fsq.data.images import read_image
from uvim_fsq.data.sample import Array
from uvim_fsq.data.tiles import MIN_SIDE, Tiling
from uvim_fsq.errors import UserError, enough_memory
from uvim_fsq.files import disk_is_full
from uvim_fsq.inference.films import FILM_SUFFIXES, MAX_RATE, MIN_RATE, SUFFIX, USUAL_RATE, Film, writing_film
from uvim_fsq.inference.prediction_folder import INDEX, Entry, PredictionFolder
from uvim_fsq.inference.predictor import Predictor


@dataclass(frozen=True)
class Options:
    """How files are predicted.

    Attributes:
        tiles: predict large pictures by tiles of this side in pixels, 0: of the models' image side. None: as a whole.
        overlap: of the tiles, see `Tiling`.
        write: "files": the results of each picture and of each frame; "film": one film of the pictures that each film
            and the sequence of pictures become. None: films as films, pictures as files.
        rate: frames per second of films that are written; None: that of the film, or 25.
        overwrite: predict everything again, also what has complete results with the same checkpoint and settings.
    """

    tiles: int | None = None
    overlap: float = 0.25
    write: Literal["files", "film"] | None = None
    rate: float | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        Tiling(MIN_SIDE if self.tiles in (None, 0) else self.tiles, self.overlap)
        if self.rate is not None and not MIN_RATE <= self.rate <= MAX_RATE:
            raise UserError(
                f"{self.rate:g} frames per second are not possible; give a number from {MIN_RATE:g} to {MAX_RATE:g}"
            )


def predict_files(
    run_dir: str | Path,
    inputs: Sequence[str],
    out: str | Path,
    overrides: Sequence[str] = (),
    options: Options | None = None,
) -> list[Entry]:
    """Predicts all images of `inputs` (files or folders) and writes the results to the folder `out`.

    The index `out`/predictions.json lists these results along with those of earlier calls. If two images have the same
    name, their results are prefixed with the folder's name, or suffixed with a number. What an earlier call, perhaps
    one that was killed, has completed with the same weights and settings is not predicted again.

    Args:
        run_dir: the run or checkpoint directory of an LM or a direct model, or an export of one.
        inputs: image files, folders of images, and films.
        out: the output folder; created if needed.
        overrides: `key=value` strings; of an export, those that it does not fix.
        options: tiles, films, and what is predicted again.

    Returns one dict per image, in order: `image`; the path of each written file by its kind, or `error`; `checkpoint`;
    for tokens, `decoding`; if there are any, `overrides`, `decoding_from`, the tuning, and `tiles`; `settings` and
    `stamp`, which tell whether the result would be the same again. A film that was written as one has one dict; its
    frames as files, one each.

    Raises UserError before predicting anything if a result would replace a file that is not an earlier result. Raises
    UserError if the disk is full; the index then lists all complete results.
    """
    options = options or Options()
    files = list_images(list(inputs))
    films = list(dict.fromkeys(file for file in files if is_film(file)))
    pictures = [file for file in files if not is_film(file)]
    load = Predictor.from_export if is_export(run_dir) else Predictor.from_run
    predictor = load(run_dir, overrides)
    work = _Work(predictor, Path(out), pictures, films, [Path(entry) for entry in inputs], options)
    begin = time.monotonic()
    try:
        work.run()
    finally:
        work.folder.write_index(work.entries)
    if work.predicted:
        seconds = time.monotonic() - begin
        rate = work.predicted / max(seconds, 1e-9)
        what = "picture" if work.predicted == 1 else "pictures"
        say(f"{work.predicted} {what} predicted in {clock(seconds)}, {rate:.3g} pictures/s")
    return work.entries


def is_film(file: Path) -> bool:
    """Whether a file is taken for a film, by its name."""
    return file.suffix.lower() in FILM_SUFFIXES


class _Work:
    """One call of `predict_files`: what is to be done, and the entries of what was.

    Raises UserError if the task cannot do it, or a result would replace a file that is not an earlier result.
    """

    def __init__(
        self,
        predictor: Predictor,
        out: Path,
        pictures: list[Path],
        films: list[Path],
        named: list[Path],
        options: Options,
    ) -> None:
        self.predictor, self.options = predictor, options
        side = predictor.run.data.image_size if options.tiles == 0 else options.tiles
        self.tiles = None if side is None else Tiling(side, options.overlap)
        provenance = {**predictor.provenance, "settings": predictor.fingerprint}
        if self.tiles is not None:
            predictor.check_tiles()
            provenance["tiles"] = str(self.tiles)
            provenance["settings"] += f" tiles {self.tiles}"
        self.films, sequence = films, pictures if options.write == "film" else []
        alone = [] if sequence else pictures
        if options.rate is not None:
            if options.write == "files" or not (films or sequence):
                raise UserError("frames per second are for films, and none is written; leave out --fps")
            provenance["settings"] += f" rate {options.rate:g}"
        self.folder = PredictionFolder(
            out,
            predictor.task,
            alone,
            named,
            provenance=provenance,
            resume=not options.overwrite,
            others=[*films, *sequence],
        )
        self.sequence = self.folder.without_results(sequence, named)
        self.film_stems = {film: self.folder.choose_stem(film, self._film_files) for film in films}
        self.entries: list[Entry] = []
        self.predicted = 0
        self._written = time.monotonic()

    def run(self) -> None:
        """Predicts everything; pictures first, then films."""
        folder = self.folder
        if folder.images:
            self.entries = list(folder.done.values())
            with Bar(f"predicting into {folder.out}", len(folder.images), start=len(folder.done)) as bar:
                for entry in self._pictures():
                    self._add(entry)
                    bar.update(len(self.entries))
            order = {str(file): number for number, file in enumerate(folder.images)}
            self.entries.sort(key=lambda entry: order[entry["image"]])
        if self.sequence:
            self._sequence()
        for film in self.films:
            try:
                self._film(film)
            except UserError as error:
                self._refuse_full_disk(error)
                self._add({"image": str(film), "error": str(error)})

    def _add(self, entry: Entry) -> None:
        self.entries.append({**entry, **self.folder.provenance} if "error" in entry else entry)
        self.predicted += "error" not in entry
        if time.monotonic() - self._written > LINES:
            self.folder.write_index(self.entries)
            self._written = time.monotonic()

    def _refuse_full_disk(self, error: UserError) -> None:
        if disk_is_full(error):
            raise UserError(f"{error}; {self.folder.out / INDEX} lists the complete results") from error

    def _pictures(self) -> Iterator[Entry]:
        """Yields one entry per image. Of a batch only the models' inputs are kept; images are read twice."""
        predictor, folder = self.predictor, self.folder
        for batch in _batches(folder.files, self._batch_size):
            prepared: dict[Path, Array] = {}
            errors: dict[Path, str] = {}
            for file in batch:
                try:
                    if self.tiles is None:
                        prepared[file] = predictor.prepare(read_image(file))
                except UserError as error:
                    errors[file] = str(error)
            items = dict(zip(prepared, predictor.predict_prepared(list(prepared.values())), strict=True))
            for file in batch:
                if file in errors:
                    yield {"image": str(file), "error": errors[file]}
                    continue
                try:
                    with enough_memory(f"make {file} smaller"):
                        image = read_image(file)
                        entry = folder.save(file, self._at_size(items.get(file), image, file), image)
                except UserError as error:
                    self._refuse_full_disk(error)
                    entry = {"image": str(file), "error": str(error)}
                yield entry

    @property
    def _batch_size(self) -> int:
        return 1 if self.tiles is not None else self.predictor.run.eval.batch_size

    def _at_size(self, item: Any, image: Array, file: Path) -> Any:
        """The prediction at the size of the image; by tiles, or from the item of `Task.decode`."""
        if self.tiles is not None:
            with Bar(f"predicting {file.name} by tiles") as bar:  # there may be thousands
                return self.predictor.predict_tiles(image, self.tiles, bar.update)
        return self.predictor.task.to_size(item, image)

    def _film_files(self, stem: str) -> list[str]:
        """The names that the results of a film need at least: the film, or the files of its first frame."""
        if self.options.write == "files":
            return [Path(path).name for path in self.predictor.task.prediction_files(_frame(stem, 1)).values()]
        return [stem + SUFFIX]

    def _film(self, file: Path) -> None:
        """Predicts a film to one, or to the files of each frame."""
        stem = self.film_stems[file]
        if self.options.write == "files":
            self._frames(file, stem)
            return
        done = self.folder.finished(str(file), [file])
        if done is not None:
            self.entries.append(done)
            return
        film = Film(file)
        bar = Bar(f"predicting {file.name}", film.frames)
        save = functools.partial(self._write_film, film, self.options.rate or film.rate, bar)
        self._add(self.folder.write(str(file), [file], stem, save))
        _say_missing(film)

    def _frames(self, file: Path, stem: str) -> None:
        """The files of each frame of a film. Frames with complete results are read but not predicted."""
        film, folder = Film(file), self.folder
        numbers: list[int] = []
        done: dict[int, Entry] = {}

        def wanted() -> Iterator[Array]:
            for number, frame in enumerate(film, 1):
                entry = folder.finished(f"{file}#{number:06d}", [file])
                if entry is not None:
                    folder.hold(entry, holder=stem)
                    done[number] = entry
                else:
                    numbers.append(number)
                    yield frame

        before = len(self.entries)
        with Bar(f"predicting {file.name}", film.frames) as bar:
            for place, (frame, prediction) in enumerate(self.predictor.predict_frames(wanted(), self.tiles)):
                number, name = numbers[place], _frame(stem, numbers[place])
                folder.reserve(name, holder=stem)
                self._add(folder.save_frame(file, f"{file}#{number:06d}", name, prediction, frame))
                bar.update(number)
        made = dict(zip(numbers, self.entries[before:], strict=True))
        self.entries[before:] = [entry for _, entry in sorted((done | made).items())]
        _say_missing(film)

    def _sequence(self) -> None:
        """Predicts a sequence of pictures to one film, named after their folder."""
        first = self.sequence[0]
        image = f"{first} to {self.sequence[-1]}, {len(self.sequence)} pictures"
        place = first.absolute().parent

        def own(entry: Entry) -> bool:
            return Path(entry["image"].partition(" to ")[0]).parent == first.parent

        stem = self.folder.choose_stem(place / f"{place.name or 'film'}{SUFFIX}", self._film_files, own)
        done = self.folder.finished(image, self.sequence)
        if done is not None:
            self.entries.append(done)
            return
        bar = Bar(f"predicting {stem}{SUFFIX}", len(self.sequence))
        frames = (read_image(file) for file in self.sequence)
        save = functools.partial(self._write_film, frames, self.options.rate or USUAL_RATE, bar)
        self._add(self.folder.write(image, self.sequence, stem, save))

    def _write_film(self, frames: Iterable[Array], rate: float, bar: Bar, stem: str) -> dict[str, str]:
        """Writes the film of the frames' predictions."""
        path = Path(stem + SUFFIX)
        with bar, writing_film(path, rate) as writer:
            for frame, prediction in self.predictor.predict_frames(frames, self.tiles):
                writer.write(self.predictor.task.film_frame(frame, prediction))
                bar.update(writer.frames)
        self.predicted += writer.frames - 1  # `_add` counts one
        return {"film": str(path)}


def _say_missing(film: Film) -> None:
    # The number in the header is an estimate in some formats.
    if film.read < 0.95 * film.frames:
        read = f"only {film.read} of {film.frames} frames could be read"
        say(f"{printable(str(film.file))}: {read}; the file may be damaged")


def _frame(stem: str, number: int) -> str:
    return f"{stem}_{number:06d}"


def _batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
