"""Plots of training curves and code usage."""

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


def curve_figure(runs: Mapping[str, Path]) -> Figure:
    """Plots the training loss over steps, with one axis per run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(runs), 3.2))
    for i, (name, path) in enumerate(runs.items()):
        axis = figure.add_subplot(1, len(runs), i + 1)
        lines = [line for line in read_metrics(path) if "loss" in line]
        axis.plot([line["step"] for line in lines], [line["loss"] for line in lines])
        axis.set_title(f"{name}: training loss")
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    figure.tight_layout()
    return figure


def usage_figure(counts: Sequence[int], levels: Sequence[Sequence[int]]) -> Figure:
    """Plots the sorted code counts and, if given, the level histogram of each channel (`CodeStatistics`)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.2))
    axis = figure.add_subplot(1, 2, 1)
    axis.stairs(sorted(counts, reverse=True), fill=True)  # a bar per code takes minutes for large codebooks
    used = sum(count > 0 for count in counts)
    axis.set_title(f"codes by frequency: {used} of {len(counts)} used")
    axis.set_yscale("symlog")
    if levels:
        _draw_levels(figure.add_subplot(1, 2, 2), levels)
    figure.tight_layout()
    return figure


def _draw_levels(axis: Axes, levels: Sequence[Sequence[int]]) -> None:
    for i, histogram in enumerate(levels):
        total, half = max(sum(histogram), 1), len(histogram) // 2
        # The code values of FSQ, which are not symmetric about 0 for an even number of levels.
        values = (np.arange(len(histogram)) - half) / half
        axis.plot(values, [count / total for count in histogram], "o-", label=f"channel {i}")
    axis.set_title("share of each level per channel")
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=7)
