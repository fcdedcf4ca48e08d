"""Speed of `uvim-fsq predict`: from a picture's file to the written result, in a new process and in a warm one."""

from __future__ import annotations

import functools
import itertools
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image

from uvim_fsq.benchmark.setup import Sizes, fresh_lm, fresh_oracle
from uvim_fsq.checkpoints.files import save_checkpoint
from uvim_fsq.checkpoints.run_directory import WEIGHTS, find_oracle, read_config, resolve_checkpoint, weights_hash
from uvim_fsq.config.parse import dump_yaml
from uvim_fsq.config.plugins import environment
from uvim_fsq.config.schema import LMRun
from uvim_fsq.data.images import read_image
from uvim_fsq.errors import UserError
from uvim_fsq.inference.exports import read_manifest
from uvim_fsq.inference.prediction_folder import PredictionFolder
from uvim_fsq.inference.predictor import Predictor
from uvim_fsq.performance.timing import Measurement, Timing, milliseconds, rate, time_interleaved

#: Height and width of the pictures: those of NYU Depth v2.
SIZE = (480, 640)


def write_picture(file: Path, seed: int = 0) -> Path:
    """Writes a JPEG of `SIZE`, smooth with some detail as photos are, about 80 kB."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((SIZE[1], SIZE[0]), Image.Resampling.BICUBIC), np.float32)
    noisy = smooth + generator.normal(0, 6, (*SIZE, 3))
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, format="JPEG", quality=90)
    return file


@contextmanager
def place_of_run(sizes: Sizes | None, run: Path | None) -> Iterator[Path | None]:
    """The run directory to predict with: `run`, or a temporary one with random weights of the given sizes."""
    if sizes is None or sizes.lm is None:
        yield run
        return
    with TemporaryDirectory(prefix="uvim-fsq-") as temporary:
        yield _write_run(sizes, Path(temporary))


def _write_run(sizes: Sizes, folder: Path) -> Path:
    assert sizes.lm is not None
    oracle, place = fresh_oracle(sizes)[0], folder / "oracle"
    config = dump_yaml(replace(sizes.oracle, train=replace(sizes.oracle.train, out=str(place))))
    trained = save_checkpoint(place, 1, config=config, weights=oracle.state_dict(), state={})
    lm, out = fresh_lm(sizes, torch.device("cpu"))[0], folder / "lm"
    config = dump_yaml(replace(sizes.lm, oracle=str(place), train=replace(sizes.lm.train, out=str(out))))
    hashes = {"oracle_sha256": weights_hash(trained)}
    save_checkpoint(out, 1, config=config, weights=lm.state_dict(), state={}, **hashes)
    return out


def measure_predicting(
    run: Path,
    overrides: Sequence[str],
    device: torch.device,
    *,
    batches: Sequence[int],
    repeats: int,
    exports: Sequence[Path] = (),
) -> list[Measurement]:
    """Milliseconds of the whole command for one picture, and images/s of a loaded model for each batch size.

    The pictures are read and the results written as `uvim-fsq predict` does, from the page cache. Exports take turns
    with the run, and the sizes of their files and of the run's weights are listed too.

    Raises UserError for a run that cannot predict, or if the command fails.
    """
    predictor = Predictor.from_run(run, overrides, device)
    name = f"predict {predictor.task.name}"
    predictors = {"": predictor, **_exported(exports)}
    with TemporaryDirectory(prefix="uvim-fsq-") as temporary:
        place = Path(temporary)
        pictures = [write_picture(place / f"{i}.jpg", i) for i in range(max(batches))]
        command = [sys.executable, "-m", "uvim_fsq", "predict", str(run), str(pictures[0]), *overrides]
        cold = [_seconds([*command, "--out", str(place / "cold")]) for _ in range(repeats + 1)]
        works: dict[str, Callable[[], object]] = {}
        counts: dict[str, int] = {}
        for batch, (kind, used) in itertools.product(batches, predictors.items()):
            files, row = pictures[:batch], f"{name}{kind}, warm, batch {batch}"
            folder = PredictionFolder(place / f"warm_{len(works)}", used.task, files, named=files)
            works[row], counts[row] = functools.partial(_predict, used, folder), batch
        timings = time_interleaved(works, device, repeats=repeats)
    lines = [milliseconds(f"{name}, the whole command, one picture", Timing(tuple(cold[1:])))]
    return [*lines, *(rate(row, timings[row], counts[row]) for row in works), *_sizes(name, run, exports)]


def _exported(folders: Sequence[Path]) -> dict[str, Predictor]:
    """Name of a row's kind -> an export."""
    found = {_kind(folder): Predictor.from_export(folder) for folder in folders}
    if len(found) < len(folders):
        raise UserError("--export names two exports of one kind, which the table could not tell apart; give one")
    return found


def _kind(folder: Path) -> str:
    manifest = read_manifest(folder)
    return f", {manifest['format']}{' int8' if manifest.get('int8') else ''} export"


def _sizes(name: str, run: Path, exports: Sequence[Path]) -> list[Measurement]:
    """The sizes of the run's weights, those of its oracle included, and of the exports."""
    if not exports:
        return []
    checkpoint = resolve_checkpoint(run)
    trained = read_config(checkpoint)
    places = [checkpoint, *([find_oracle(checkpoint, trained)] if isinstance(trained, LMRun) else [])]
    sizes = {"": [place / WEIGHTS for place in places]}
    sizes |= {_kind(folder): [folder / file for file in read_manifest(folder)["files"]] for folder in exports}
    return [
        Measurement(f"{name}{kind}, size of the weights", sum(file.stat().st_size for file in files) / 1e6, "MB")
        for kind, files in sizes.items()
    ]


def _predict(predictor: Predictor, folder: PredictionFolder) -> None:
    """From the files of one batch to their written results."""
    items = predictor.predict_prepared([predictor.prepare(read_image(file)) for file in folder.files])
    for file, item in zip(folder.files, items, strict=True):
        image = read_image(file)
        folder.save(file, predictor.task.to_size(item, image), image)


def _seconds(command: Sequence[str]) -> float:
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise UserError(f"benchmark predict: the command failed ({(said or [''])[-1][:300]})")
    return time.perf_counter() - start
