"""Plots of tokens: where codes are used, where tokens are right, how confidence and correctness agree.

L code length, V codebook size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from uvim_fsq.data.sample import Array
from uvim_fsq.evaluation.examination import CONFIDENCE_BINS, Calibration
from uvim_fsq.reports.figures import SIZE, draw_legend, new_axes
from uvim_fsq.tasks.base import Matrix

# Imported only when something is drawn, because it takes half a second.
if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Codes whose places are shown: the most frequent ones.
SHOWN = 8


def square(values: Array) -> Array:
    """(N,) -> the smallest square that holds the values, row by row, filled up with NaN."""
    side = math.isqrt(max(len(values) - 1, 0)) + 1
    padded = np.full(side * side, np.nan)
    padded[: len(values)] = values
    return padded.reshape(side, side)


def _map(axis: Axes, values: Array, low: float | None = None, high: float | None = None) -> None:
    shown = axis.imshow(values, cmap="viridis", vmin=low, vmax=high, interpolation="nearest")
    axis.set_xticks([])
    axis.set_yticks([])
    assert axis.figure is not None
    axis.figure.colorbar(shown, ax=axis, shrink=0.85)


def codebook_figure(counts: Array) -> Figure:
    """Draws a cell for each code, by index: the logarithm of how often it is used. Unused codes are left out."""
    figure, axis = new_axes((3.6, 3.0))
    with np.errstate(divide="ignore"):
        logarithm = np.log10(counts.astype(np.float64))
    _map(axis, square(np.where(counts > 0, logarithm, np.nan)))
    return figure


def perplexity(positions: Array) -> Array:
    """(L, V) counts -> (L,) effective number of codes at each place."""
    p = positions / np.maximum(positions.sum(1, keepdims=True), 1)
    logarithm = np.log(p, out=np.zeros_like(p), where=p > 0)
    return np.exp(-(p * logarithm).sum(1))


def place_figure(values: Array, low: float | None = None, high: float | None = None) -> Figure:
    """Draws a value (L,) for each token at its place in the grid of tokens."""
    figure, axis = new_axes((3.6, 3.0))
    _map(axis, square(values), low, high)
    return figure


def code_places_figure(positions: Array) -> Figure:
    """Draws where each of the most frequent codes is used: the share of images that have it at each place (L, V)."""
    from matplotlib.figure import Figure

    counts = positions.sum(0)
    top = [int(code) for code in np.argsort(-counts, kind="stable")[:SHOWN] if counts[code]]
    figure = Figure(figsize=(SIZE[0], 1.6 * -(-len(top) // 4)), layout="constrained")
    images = max(positions.sum(1).max(), 1)
    for i, code in enumerate(top):
        axis = figure.add_subplot(-(-len(top) // 4), 4, i + 1)
        share = positions[:, code] / images
        axis.imshow(square(share), cmap="viridis", vmin=0, interpolation="nearest")
        axis.set_title(f"code {code}\nup to {share.max():.0%}", fontsize=8)
        axis.set_xticks([])
        axis.set_yticks([])
    return figure


def reliability_figure(found: Calibration) -> Figure:
    """Plots the share of right tokens over confidence; on the diagonal they agree. Below, the share of tokens."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.8, 4.2), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    used, edges = found.tokens > 0, np.linspace(0, 1, CONFIDENCE_BINS + 1)
    share = np.divide(found.right, found.tokens, out=np.zeros(CONFIDENCE_BINS), where=used)
    upper.bar(edges[:-1][used], share[used], 1 / CONFIDENCE_BINS, align="edge", alpha=0.6)
    upper.plot(found.confidence[used] / found.tokens[used], share[used], "o", color="C1", markersize=4)
    upper.plot([0, 1], [0, 1], "--", color="gray", linewidth=1)
    upper.set_ylabel("share of right tokens")
    upper.set_xlim(0, 1)
    upper.set_ylim(0, 1)
    lower.stairs(found.tokens / found.tokens.sum(), edges, fill=True)
    lower.set_xlabel("probability of the token")
    lower.set_ylabel("tokens")
    for axis in (upper, lower):
        axis.grid(alpha=0.3)
    return figure


def breakdown_figure(found: Mapping[str, Matrix]) -> Figure:
    """Plots the first column of tables with the same rows, one line for each name."""
    figure, axis = new_axes()
    for name, matrix in found.items():
        axis.plot(range(len(matrix.rows)), matrix.values[:, 0], "o-", markersize=4, label=name)
    first = next(iter(found.values()))
    axis.set_xticks(range(len(first.rows)), first.rows, rotation=40, ha="right", fontsize=8, parse_math=False)
    axis.set_ylabel(first.columns[0], parse_math=False)
    axis.set_ylim(bottom=min(0.0, axis.get_ylim()[0]))
    axis.grid(alpha=0.3)
    draw_legend(axis)
    return figure


def values_figure(found: Mapping[str, Sequence[float]], name: str) -> Figure:
    """Plots histograms of a metric of single images, one line for each prediction."""
    figure, axis = new_axes()
    edges = np.histogram_bin_edges([value for values in found.values() for value in values], bins=30)
    for label, values in found.items():
        axis.stairs(np.histogram(values, edges)[0], edges, label=label, linewidth=1.4)
    axis.set_xlabel(f"{name} of an image", parse_math=False)
    axis.set_ylabel("images")
    axis.grid(alpha=0.3)
    draw_legend(axis)
    return figure
