"""Paired bootstrap intervals of metric differences, from the share of each image in a metric's sums and counts.

Metrics such as PQ and mIoU are no means over images, so resampling their per-image values would give another metric.
The states of a `Metric`, however, add up. A resample is the weighted sum of the images' states.

N images, R resamples.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from uvim_fsq.data.sample import Array
from uvim_fsq.errors import UserError
from uvim_fsq.files import write_whole
from uvim_fsq.tasks.base import Metric

#: Largest state of an image, in numbers, that is recorded. Those of Fréchet distances, with a matrix, are larger.
MAX_NUMBERS = 10_000
RESAMPLES = 1000


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

    def stacked(self) -> dict[str, Array]:
        """Name -> (N, ...) float64."""
        return {name: np.stack([state[name] for state in self.states]) for name in self.states[0]}


def is_recordable(metric: Metric) -> bool:
    """Whether the state of an image is small enough to be recorded."""
    return sum(x.size for x in metric.state().values()) <= MAX_NUMBERS


def write_states(file: Path, found: Mapping[str, ImageStates]) -> None:
    """Writes states by name of the predict function to an .npz file."""
    arrays: dict[str, Array] = {}
    for name, states in found.items():
        if states.ids:
            arrays[f"{name}/ids"] = np.array(states.ids)
            arrays |= {f"{name}/{key}": x for key, x in states.stacked().items()}
    content = io.BytesIO()
    np.savez_compressed(content, allow_pickle=False, **arrays)
    write_whole(file, lambda path: Path(path).write_bytes(content.getvalue()))


def read_states(file: Path, name: str) -> tuple[list[str], dict[str, Array]]:
    """The ids and the stacked states (N, ...) of one predict function, sorted by id.

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
    ids = [str(x) for x in found.pop("ids")]
    order = sorted(range(len(ids)), key=ids.__getitem__)
    return [ids[i] for i in order], {key: x[order] for key, x in found.items()}


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


def paired_bootstrap(
    metric: Callable[[], Metric],
    key: str,
    first: tuple[Sequence[str], Mapping[str, Array]],
    second: tuple[Sequence[str], Mapping[str, Array]],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """The 95% percentile interval of a difference, from images drawn with replacement, the same for both (Efron 1979).

    Args:
        metric: makes an empty metric.
        key: the name of the figure, e.g. "rmse".
        first, second: ids and stacked states, as `read_states` returns them.
        resamples: R.
        seed: of the draws.

    Raises UserError if the images are not the same.
    """
    if list(first[0]) != list(second[0]):
        raise UserError("a paired interval needs two predictions of the same images; evaluate both on the same split")
    count = len(first[0])
    generator = np.random.default_rng(seed)
    weights = generator.multinomial(count, np.full(count, 1 / count), size=resamples).astype(np.float64)
    weights = np.concatenate([np.ones((1, count)), weights])

    def figures(states: Mapping[str, Array]) -> Array:
        sums = {name: np.tensordot(weights, x, axes=1) for name, x in states.items()}
        found = np.empty(len(weights))
        for i in range(len(weights)):
            accumulator = metric()
            accumulator.load_state({name: x[i] for name, x in sums.items()})
            found[i] = accumulator.compute()[key]
        return found

    differences = figures(first[1]) - figures(second[1])
    low, high = np.percentile(differences[1:], [2.5, 97.5])
    return Interval(float(differences[0]), float(low), float(high), float(differences[1:].std(ddof=1)))
