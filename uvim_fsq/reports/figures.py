"""Plots of training curves, code usage and confusion matrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from uvim_fsq.files import read_json_lines

# Imported only when something is drawn, because it takes half a second.
if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; empty if there is no such file."""
    return read_json_lines(run_dir / "metrics.jsonl")


#: Size in inches of a chart that can be read on a telephone.
SIZE = (4.8, 3.0)
#: Steps of a chart of counts at most; more cannot be seen.
MAX_STEPS = 1000
#: The text of a cell of a matrix. Not black, which becomes the color of the page's text: cells are light anyway.
DARK = "#101010"


def new_axes(size: tuple[float, float] = SIZE) -> tuple[Figure, Axes]:
    """A figure with one axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.add_subplot()


def draw_legend(axis: Axes) -> None:
    """Adds a legend. Names may hold dollar signs, which would be typeset as mathematics."""
    for text in axis.legend(fontsize=8, frameon=False).get_texts():
        text.set_parse_math(False)


def curve_figure(run: Path) -> Figure:
    """Plots the training loss of a run over steps."""
    figure, axis = new_axes()
    lines = [line for line in read_metrics(run) if "loss" in line]
    axis.plot([line["step"] for line in lines], [line["loss"] for line in lines])
    axis.set_xlabel("step")
    axis.set_ylabel("training loss")
    axis.grid(alpha=0.3)
    return figure


def usage_figure(counts: Sequence[int], levels: Sequence[Sequence[int]]) -> Figure:
    """Plots the sorted code counts and, if given, the level histogram of each channel (`CodeStatistics`)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.2))
    axis = figure.add_subplot(1, 2, 1)
    _draw_counts(axis, counts)
    used = sum(count > 0 for count in counts)
    axis.set_title(f"codes by frequency: {used} of {len(counts)} used")
    if levels:
        axis = figure.add_subplot(1, 2, 2)
        _draw_levels(axis, levels)
        axis.set_title("share of each level per channel")
    figure.tight_layout()
    return figure


def count_figure(counts: Sequence[int]) -> Figure:
    """Plots the sorted code counts."""
    figure, axis = new_axes()
    _draw_counts(axis, counts)
    axis.set_xlabel("codes by frequency")
    axis.set_ylabel("tokens")
    return figure


def _draw_counts(axis: Axes, counts: Sequence[int]) -> None:
    ordered = np.sort(np.asarray(counts))[::-1]
    # A bar per code takes minutes for large codebooks, and a step per code megabytes.
    edges = np.unique(np.linspace(0, len(ordered), MAX_STEPS + 1).astype(int))
    axis.stairs(ordered[edges[:-1]], edges, fill=True)
    axis.set_yscale("symlog")


def level_figure(levels: Sequence[Sequence[int]]) -> Figure:
    """Plots the level histogram of each channel (`CodeStatistics.level_histogram`)."""
    figure, axis = new_axes()
    _draw_levels(axis, levels)
    axis.set_xlabel("level")
    axis.set_ylabel("share of tokens")
    return figure


def matrix_figure(matrix: Mapping[str, Any]) -> Figure:
    """Plots a confusion matrix (`rows`, `columns`, `values`) as shares of its rows in percent."""
    from matplotlib.figure import Figure

    values = np.array(matrix["values"], np.float64)
    shares = 100 * values / np.maximum(values.sum(1, keepdims=True), 1)
    rows, columns = values.shape
    size = (2.5 + 0.4 * columns, 2 + 0.4 * rows) if rows <= 40 else (6, 5.5)
    figure = Figure(figsize=size, layout="constrained")
    axis = figure.add_subplot()
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    axis.set_xlabel("predicted")
    axis.set_ylabel("true, row = 100%")
    if rows <= 40:
        # parse_math: a class may be named "$".
        axis.set_xticks(range(columns), matrix["columns"], rotation=90, parse_math=False)
        axis.set_yticks(range(rows), matrix["rows"], parse_math=False)
        for i, j in np.argwhere(shares >= 1):
            shade = "white" if shares[i, j] > 60 else DARK
            axis.text(j, i, f"{shares[i, j]:.0f}", ha="center", va="center", fontsize=7, color=shade)
    return figure


def _draw_levels(axis: Axes, levels: Sequence[Sequence[int]]) -> None:
    for i, histogram in enumerate(levels):
        total, half = max(sum(histogram), 1), len(histogram) // 2
        # The code values of FSQ, which are not symmetric about 0 for an even number of levels.
        values = (np.arange(len(histogram)) - half) / half
        axis.plot(values, [count / total for count in histogram], "o-", label=f"channel {i}")
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=7, frameon=False)
