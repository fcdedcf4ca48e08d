"""Statistics of a data set's samples, for every task: sizes, values and classes of labels, missing pixels."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from uvim_fsq.data.resize import resize_nearest
from uvim_fsq.data.sample import Sample
from uvim_fsq.tasks.base import Categorical, Task

# Imported only when something is drawn, because it takes half a second.
if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Values taken from each map for the histograms, so that large photos do not fill the memory.
VALUES = (64, 64)
#: Components of vectors that get a chart each; those of longer vectors share one.
MOST_COMPONENTS = 4
#: Classes shown in a chart; the rest are added up.
MOST_CLASSES = 40


@dataclass
class Statistics:
    """Counts over samples.

    Attributes:
        sizes: (height, width) of each image.
        values: map of real values -> samples of its valid values: finite and above 0, or of a map of vectors, finite
            and not all 0; each component of a vector is named by itself.
        missing: map or label channel -> share of its pixels without a value, of each image.
        counts: categorical label channel -> (C,) pixels of each class, at label size.
        segments: map of integers -> the number of segments in each image, which are its distinct values above 0; or of
            classes, if it is a label channel too.
    """

    sizes: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])
    values: dict[str, list[np.ndarray]] = field(default_factory=dict[str, list[np.ndarray]])
    missing: dict[str, list[float]] = field(default_factory=dict[str, list[float]])
    counts: dict[str, np.ndarray] = field(default_factory=dict[str, np.ndarray])
    segments: dict[str, list[int]] = field(default_factory=dict[str, list[int]])

    def add(self, task: Task, sample: Sample, labels: dict[str, np.ndarray]) -> None:
        """Adds a sample at native size and its labels, as from `Task.encode`."""
        self.sizes.append((sample.image.shape[0], sample.image.shape[1]))
        for name, values in sample.maps.items():
            if np.issubdtype(values.dtype, np.floating):
                valid: np.ndarray = np.isfinite(values) & (values > 0)
                if values.ndim == 3:
                    valid = np.isfinite(values).all(-1) & np.asarray(values.any(-1))
                self.missing.setdefault(name, []).append(1 - float(valid.mean()))
                small = resize_nearest(values, VALUES)[resize_nearest(valid, VALUES)]
                for part, numbers in _components(name, small).items():
                    self.values.setdefault(part, []).append(numbers)
            elif values.ndim == 2:
                # Segments are numbered from 1, classes from 0; -1 is no label.
                first = 0 if name in task.label_channels else 1
                self.segments.setdefault(name, []).append(int((np.unique(values) >= first).sum()))
        for name, channel in task.label_channels.items():
            if isinstance(channel, Categorical):
                found = labels[name][labels[name] >= 0]
                self.missing.setdefault(f"labels {name}", []).append(1 - found.size / labels[name].size)
                total = self.counts.setdefault(name, np.zeros(channel.num_classes, np.int64))
                total += np.bincount(found.ravel(), minlength=channel.num_classes)[: channel.num_classes]


def _components(name: str, values: np.ndarray) -> dict[str, np.ndarray]:
    """The values of a map by what they are called: (N,), or (N, C) vectors."""
    if values.ndim == 1 or values.shape[1] > MOST_COMPONENTS:
        return {name: values.ravel()}
    return {f"{name}, component {c + 1}": values[:, c] for c in range(values.shape[1])}


def summary(found: Statistics) -> list[list[str]]:
    """The table of sizes, value ranges and missing pixels, header first."""
    heights, widths = zip(*found.sizes, strict=True)
    rows = [["", "smallest", "median", "largest"]]
    for name, numbers in (("image height", heights), ("image width", widths)):
        rows.append([name, *(f"{value:g}" for value in _spread(numbers))])
    for name, parts in found.values.items():
        together = np.concatenate([part.ravel() for part in parts])
        if together.size:
            rows.append([f"{name}: value", *(f"{value:.4g}" for value in _spread(together))])
    for name, numbers in found.segments.items():
        rows.append([f"{name}: number per image", *(f"{value:g}" for value in _spread(numbers))])
    for name, shares in found.missing.items():
        rows.append([f"{name}: missing pixels per image", *(f"{value:.1%}" for value in _spread(shares))])
    return rows


def _spread(numbers: Iterable[float]) -> tuple[float, float, float]:
    array = np.fromiter(numbers, float)
    return float(array.min()), float(np.median(array)), float(array.max())


def class_names(task: Task, channel: str) -> list[str]:
    """Names of a categorical channel's classes: the task's own if it has as many names, else numbers."""
    kind = task.label_channels[channel]
    count = kind.num_classes if isinstance(kind, Categorical) else 0
    names = getattr(task, "names", None)
    fits = isinstance(names, (list, tuple)) and len(names) == count
    return [str(name) for name in names] if fits and names is not None else [str(i) for i in range(count)]


def statistics_figures(task: Task, found: Statistics) -> list[tuple[str, Figure]]:
    """Charts with their titles: values, class frequencies, segments per image, missing pixels."""
    figures = [(f"values of {name}", _histogram(parts)) for name, parts in found.values.items()]
    figures += [
        (f"frequency of the labels {name}", _frequencies(class_names(task, name), counts))
        for name, counts in found.counts.items()
        if counts.any()
    ]
    for name, numbers in found.segments.items():
        figures.append((f"{name}: number per image", _per_image(np.array(numbers, float))))
    for name, shares in found.missing.items():
        if any(shares):
            figures.append((f"{name}: share of missing pixels per image", _per_image(np.array(shares))))
    return figures


def _axes(width: float = 5.5, height: float = 3.0) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axis = figure.add_subplot()
    axis.grid(alpha=0.3)
    return figure, axis


def _histogram(parts: list[np.ndarray]) -> Figure:
    figure, axis = _axes()
    together = np.concatenate([part.ravel() for part in parts])
    if together.size:
        counts, edges = np.histogram(together, bins=60)
        axis.stairs(counts / together.size, edges, fill=True)
    axis.set_xlabel("value")
    axis.set_ylabel("share of valid pixels")
    return figure


def _per_image(numbers: np.ndarray) -> Figure:
    figure, axis = _axes()
    low, high = numbers.min(), numbers.max()
    counted = high - low <= 60 and (numbers == numbers.round()).all()
    axis.hist(numbers, bins=np.arange(low - 0.5, high + 1) if counted else 40)
    axis.set_ylabel("images")
    return figure


def _frequencies(names: list[str], counts: np.ndarray) -> Figure:
    shares = counts / counts.sum()
    if len(shares) > 2 * MOST_CLASSES and all(name.isdigit() for name in names):
        # Many numbered classes are bins of a quantity, whose order matters.
        figure, axis = _axes()
        axis.stairs(shares, fill=True)
        axis.set_xlabel("label")
        axis.set_ylabel("share of labels")
        return figure
    order = np.argsort(-shares, kind="stable")
    shown = [i for i in order if shares[i] > 0][:MOST_CLASSES]
    bars, titles = [float(shares[i]) for i in shown], [names[i][:30] for i in shown]
    rest = [i for i in order if shares[i] > 0][MOST_CLASSES:]
    if rest:
        bars.append(float(shares[rest].sum()))
        titles.append(f"{len(rest)} others")
    figure, axis = _axes(height=0.6 + 0.2 * len(bars))
    axis.barh(range(len(bars)), bars)
    axis.set_yticks(range(len(bars)))
    # Names may hold dollar signs, which would be typeset as mathematics.
    axis.set_yticklabels(titles, parse_math=False)
    axis.invert_yaxis()
    axis.set_xlabel("share of labels")
    return figure
