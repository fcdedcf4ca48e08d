"""Paired bootstrap intervals of metric differences, from the share of each image in a metric's sums and counts.

Metrics such as PQ and mIoU are no means over images, so resampling their per-image values would give another metric.
The states of a `Metric`, however, add up. A resample is the weighted sum of the images' states.

N images, R resamples.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from uvim_fsq.data.sample import Array
from uvim_fsq.errors import UserError
from uvim_fsq.files import write_whole
from uvim_fsq.tasks.base import Metric

#: Largest state of an image, in numbers, that is recorded. Those of Fréchet distances, with a matrix, are larger.
MAX_NUMBERS = 10_000
RESAMPLES = 1000


#: Ids of N images and, by name of the array, (N, ...) float64.
Stacked = tuple[list[str], dict[str, Array]]


@dataclass
class ImageStates:
    """What each image added to the state of a metric.

    Attributes:
        ids: the images' ids, in the order of evaluation.
        states: for each image, the name of the array -> what the image added, of any fixed shape.
    """

    ids: list[str] = field(default_factory=list)
    states: list[dict[str, Array]] = field(default_factory=list)

    def add(self, image: str, before: Mapping[str, Array], after: Mapping[str, Array]) -> None:
        """Records an image, given the metric's state before and after it."""
        self.ids.append(image)
        self.states.append({name: after[name] - before[name] for name in after})

    @classmethod
    def joined(cls, parts: Sequence[ImageStates]) -> ImageStates:
        """Those of several processes."""
        return cls([x for part in parts for x in part.ids], [x for part in parts for x in part.states])

    def stacked(self) -> Stacked:
        """The images' ids in order and, by name of the array, (N, ...) float64, sorted by id."""
        order = sorted(range(len(self.ids)), key=self.ids.__getitem__)
        arrays = {name: np.stack([self.states[i][name] for i in order]) for name in self.states[0]}
        return [self.ids[i] for i in order], arrays


def is_recordable(metric: Metric) -> bool:
    """Whether the state of an image is small enough to be recorded."""
    return sum(x.size for x in metric.state().values()) <= MAX_NUMBERS


def write_states(file: Path, found: Mapping[str, Stacked]) -> None:
    """Writes states by name of the predict function to an .npz file."""
    arrays: dict[str, Array] = {}
    for name, (ids, states) in found.items():
        arrays[f"{name}/ids"] = np.array(ids)
        arrays |= {f"{name}/{key}": x for key, x in states.items()}
    content = io.BytesIO()
    np.savez_compressed(content, allow_pickle=False, **arrays)
    write_whole(file, lambda path: Path(path).write_bytes(content.getvalue()))


def read_states(file: Path, name: str) -> Stacked:
    """The states of one predict function.

    Raises UserError if the file is missing or damaged, or does not have the function.
    """
    remedy = "evaluate again: uvim-fsq evaluate"
    try:
        with np.load(file, allow_pickle=False) as arrays:
            prefix = f"{name}/"
            found = {key.removeprefix(prefix): arrays[key] for key in arrays.files if key.startswith(prefix)}
    except Exception as error:  # zipfile, numpy and the file system raise many types
        raise UserError(f"{file}: cannot be read ({error}); {remedy}") from error
    if "ids" not in found:
        raise UserError(f"{file} has no images of {name!r}; {remedy}")
    return [str(x) for x in found.pop("ids")], found


@dataclass(frozen=True)
class Interval:
    """A difference of two predictions in a metric, first minus second, on the same images.

    Attributes:
        difference: on all images.
        low, high: the 2.5th and 97.5th percentile over resamples.
        deviation: the standard deviation over resamples.
    """

    difference: float
    low: float
    high: float
    deviation: float

    @property
    def excludes_zero(self) -> bool:
        """Whether all of the interval is on one side of 0."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Resampled:
    """The figures of one prediction on all images and on resamples of them.

    Attributes:
        ids: the images' ids.
        figures: (1 + R,) float64, first that on all images; NaN if no image of a resample counts.
    """

    ids: list[str]
    figures: Array


def resampled(metric: Metric, key: str, states: Stacked, *, resamples: int = RESAMPLES, seed: int = 0) -> Resampled:
    """A figure on images drawn with replacement (Efron 1979), the same ones if the seed, N and R are.

    Args:
        metric: computes the figure; its state is replaced.
        key: the name of the figure, e.g. "rmse".
        states: of the prediction.
        resamples: R.
        seed: of the draws.
    """
    ids, arrays = states
    count = len(ids)
    generator = np.random.default_rng(seed)
    weights = generator.multinomial(count, np.full(count, 1 / count), size=resamples).astype(np.float64)
    weights = np.concatenate([np.ones((1, count)), weights])
    sums = {name: np.tensordot(weights, x, axes=1) for name, x in arrays.items()}
    figures = np.empty(len(weights))
    for i in range(len(weights)):
        metric.load_state({name: x[i] for name, x in sums.items()})
        try:
            figures[i] = metric.compute()[key]
        except UserError:  # a resample of images that do not count
            figures[i] = np.nan
    return Resampled(ids, figures)


def interval(pairs: Sequence[tuple[Resampled, Resampled]]) -> Interval:
    """The 95% percentile interval of a difference.

    Args:
        pairs: the two predictions; with several pairs, e.g. of models trained with other seeds, the interval is that of
            their mean difference.

    Raises UserError if the images are not the same.
    """
    if any(one.ids != pairs[0][0].ids for pair in pairs for one in pair):
        raise UserError("a paired interval needs two predictions of the same images; evaluate both on the same split")
    differences = np.mean([first.figures - second.figures for first, second in pairs], axis=0)
    low, high = np.nanpercentile(differences[1:], [2.5, 97.5])
    return Interval(float(differences[0]), float(low), float(high), float(np.nanstd(differences[1:], ddof=1)))


#: What the predictions of an LM or a direct model are compared with.
PAIRS = (("lm", "context_only"), ("lm", "direct"), ("lm", "oracle"), ("lm", "baseline"), ("direct", "baseline"))


def intervals(metric: Metric, key: str, found: Mapping[str, Stacked]) -> list[dict[str, Any]]:
    """The paired intervals of all predictions that are compared with others, for an evaluation's result.

    Args:
        metric: computes the figures; its state is replaced.
        key: the name of the figure.
        found: states by name of the predict function.
    """
    pairs = [(a, b) for a, b in PAIRS if a in found and b in found and len(found[a][0]) > 1]
    drawn = {name: resampled(metric, key, found[name]) for name in dict.fromkeys(x for pair in pairs for x in pair)}
    return [{"first": a, "second": b, "metric": key, **asdict(interval([(drawn[a], drawn[b])]))} for a, b in pairs]
