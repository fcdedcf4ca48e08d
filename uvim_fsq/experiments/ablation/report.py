"""Results of a grid, mean and standard deviation over seeds, as Markdown, CSV, JSON and an HTML page."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure

from uvim_fsq.checkpoints.loading import build_task, load_any
from uvim_fsq.checkpoints.run_directory import read_overridden, resolve_checkpoint
from uvim_fsq.errors import UserError
from uvim_fsq.evaluation.intervals import Resampled, interval, read_states, resampled
from uvim_fsq.evaluation.results import finished, read_result, states_file
from uvim_fsq.experiments.ablation.grid import Cell, Grid
from uvim_fsq.files import write_csv, write_json, write_text
from uvim_fsq.inference.predictions import predict_functions
from uvim_fsq.reports.html import html_table, png_tag, write_report
from uvim_fsq.reports.panels import panel_rows, tile

matplotlib.use("Agg")

#: Title in the table -> name of the prediction.
PREDICTIONS = {"LM": "lm", "direct": "direct", "oracle": "oracle", "context alone": "context_only"}

#: The same for pictures.
PICTURED = {"oracle": "oracle", "LM": "lm", "direct": "direct"}


def columns(metric: str, additional: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Title of a column -> the prediction and the metric that it shows."""
    names = (metric, *additional)
    measured = {f"{title} {name}": (key, name) for name in names for title, key in PREDICTIONS.items()}
    return {
        **measured,
        "codebook usage (%)": ("oracle", "codebook_usage"),
        "bits per token": ("lm", "bits_per_token"),
        "bits per image": ("lm", "bits_per_image"),
    }


def collect(grid: Grid, cells: Sequence[Cell], failures: Mapping[str, str]) -> dict[str, Any]:
    """The results of all finished cells. A row has its name, its cells, and mean, std and n of each column.

    Raises:
        UserError: two cells, which are named, were evaluated on different images or by different protocols.
    """
    results = [
        (cell, read_result(cell.result.folder, cell.file)) for cell in cells if finished(cell.result.folder, cell.file)
    ]
    common = _measured_on(results)
    titles = columns(common["main_metric"], grid.figures)
    rows: list[dict[str, Any]] = []
    for row in grid.rows:
        keys = ("figures", "checkpoint_sha256", "images", "limit", "versions")
        entries = [
            {"seed": cell.seed, "run": str(cell.result.folder), **{key: result[key] for key in keys}}
            for cell, result in results
            if cell.row == row.name
        ]
        rows.append(
            {
                "name": row.name,
                "paper": row.paper,
                "settings": row.settings,
                "cells": entries,
                "columns": {title: _summary(entries, prediction, key) for title, (prediction, key) in titles.items()},
                "intervals": _intervals(grid, row.name, [cell for cell, _ in results], common["main_metric"]),
            }
        )
    return {
        "title": grid.title,
        "protocol": common["protocol"],
        "metric": common["main_metric"],
        "data": results[0][1]["data"] if results else {},
        "images": common["images"],
        "limit": common["limit"],
        "seeds": list(grid.seeds),
        "same_protocol_as_the_paper": bool(grid.paper_protocol) and _is_papers(grid, common),
        "rows": rows,
        "failures": dict(failures),
    }


def _intervals(grid: Grid, row: str, cells: Sequence[Cell], metric: str) -> dict[str, dict[str, Any]]:
    """Differences of a row's model to context alone and to the row `compare`, over the seeds that both have."""
    own = {cell.seed: cell for cell in cells if cell.row == row}
    others = {cell.seed: cell for cell in cells if cell.row == grid.compare and row != grid.compare}
    wanted = {
        "context alone": [(cell, cell, "context_only") for cell in own.values() if not _is_direct(cell)],
        grid.compare: [(cell, others[seed], _model(others[seed])) for seed, cell in own.items() if seed in others],
    }
    found: dict[str, dict[str, Any]] = {}
    for title, entries in wanted.items():
        if not entries:
            continue
        pairs = [(_drawn(cell, _model(cell), metric), _drawn(other, name, metric)) for cell, other, name in entries]
        complete = [(first, second) for first, second in pairs if first is not None and second is not None]
        if len(complete) == len(pairs):
            found[title] = {**asdict(interval(complete)), "n": len(pairs)}
    return found


def _drawn(cell: Cell, name: str, metric: str) -> Resampled | None:
    """A metric of one prediction of a cell on resamples of the images; None if the cell has no states of it."""
    file = states_file(cell.file)
    written = file.stat().st_mtime_ns if file.exists() else 0
    return _resampled(cell.result.folder, file, written, name, metric)


# Tables are written after each cell, and resampling takes seconds for a large grid.
@functools.cache
def _resampled(folder: Path, file: Path, written: int, name: str, metric: str) -> Resampled | None:
    """Arguments: the run directory, the file of its states and when it was written, as for `_drawn`."""
    try:
        states = read_states(file, name)
    except UserError:  # a metric whose states are too large, or a decoder that does not see the image
        return None
    run, _ = read_overridden(resolve_checkpoint(folder), ())
    task = build_task(run)
    return resampled(task.metric(task.source(run.data.root, run.data.eval_split)), metric, states)


def _is_direct(cell: Cell) -> bool:
    return cell.result.run.stage == "direct"


def _model(cell: Cell) -> str:
    """The name of the predict function that a cell is about."""
    return "direct" if _is_direct(cell) else "lm"


def _measured_on(results: Sequence[tuple[Cell, Mapping[str, Any]]]) -> dict[str, Any]:
    """What all results have in common: main_metric, protocol, images, limit and, as `data.NAME`, their data.

    Raises:
        UserError: two results differ in one of these.
    """
    first: dict[str, Any] = {}
    for cell, result in results:
        # Folder names do not matter, and the models of a grid may use different image sizes.
        data = {f"data.{key}": value for key, value in result["data"].items() if key not in ("root", "image_size")}
        about = {**{key: result[key] for key in ("main_metric", "protocol", "images", "limit")}, **data}
        first = first or about
        for key in dict.fromkeys((*first, *about)):
            if first.get(key) != about.get(key):
                other = results[0][0]
                raise UserError(
                    f"{key} is {first.get(key)} in cell {other.name!r} and {about.get(key)} in cell {cell.name!r}: "
                    "their figures cannot be compared; evaluate both alike with uvim-fsq evaluate "
                    f"{other.result.folder} and {cell.result.folder}"
                )
    return first or {"main_metric": "", "protocol": "", "images": 0, "limit": None}


def _is_papers(grid: Grid, common: Mapping[str, Any]) -> bool:
    counts = {common["images"], common.get("data.count"), common.get("data.official_count")}
    whole = common["limit"] is None and len(counts) == 1
    return whole and common["protocol"] == grid.paper_protocol


def _summary(entries: Sequence[Mapping[str, Any]], prediction: str, key: str) -> dict[str, Any] | None:
    values = [entry["figures"][prediction][key] for entry in entries if key in entry["figures"].get(prediction, {})]
    if key == "codebook_usage":
        values = [100 * value for value in values]
    if not values:
        return None
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": deviation, "n": len(values)}


def table(results: Mapping[str, Any]) -> list[list[str]]:
    """Header and rows as text, without empty columns."""
    rows = results["rows"]
    titles = _titles(results)
    paper = results["same_protocol_as_the_paper"] and any(row["paper"] for row in rows)
    compared = list(dict.fromkeys(title for row in rows for title in row["intervals"]))
    metric = results["metric"]
    heads = [f"{metric} - {title} (95%)" for title in compared]
    lines = [["", *titles, *heads, *(["paper"] if paper else []), "seeds"]]
    for row in rows:
        figures = [_format(row["columns"][title]) for title in titles]
        figures += [_format_interval(row["intervals"].get(title)) for title in compared]
        lines.append([row["name"], *figures, *([row["paper"]] if paper else []), str(len(row["cells"]))])
    return lines


def _titles(results: Mapping[str, Any]) -> list[str]:
    """The columns that are not empty."""
    rows = results["rows"]
    return [title for title in rows[0]["columns"] if any(row["columns"][title] for row in rows)]


def _format(summary: Mapping[str, Any] | None) -> str:
    if summary is None:
        return ""
    digits = 3 if abs(summary["mean"]) < 10 else 1
    deviation = f" ± {summary['std']:.{digits}f}" if summary["std"] is not None else ""
    return f"{summary['mean']:.{digits}f}{deviation}"


def _format_interval(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    digits = 3 if max(abs(found["low"]), abs(found["high"])) < 10 else 1
    return f"{found['difference']:+.{digits}f} [{found['low']:+.{digits}f}, {found['high']:+.{digits}f}]"


def results_markdown(results: Mapping[str, Any]) -> str:
    """The table in Markdown, below a line about protocol, images and seeds."""
    head, *body = table(results)
    lines = [f"| {' | '.join(head)} |", f"| {' | '.join(['---'] * len(head))} |"]
    lines += [f"| {' | '.join(row)} |" for row in body]
    images = f"{results['images']} images" if results["limit"] is None else f"the first {results['images']} images only"
    about = f"{results['title']}. Protocol `{results['protocol']}`, {images}"
    lost = "".join(f"\nFailed: {name}: {why}" for name, why in results["failures"].items())
    return f"{about}; mean ± standard deviation over seeds {results['seeds']}.\n\n" + "\n".join(lines) + "\n" + lost


def plots(results: Mapping[str, Any]) -> Figure:
    """One plot per column, with the rows as points with error bars."""
    rows = results["rows"]
    titles = _titles(results)
    figure = Figure(figsize=(3.2 * len(titles), 1.2 + 0.35 * len(rows)))
    for i, title in enumerate(titles):
        axis = figure.add_subplot(1, len(titles), i + 1)
        for y, row in enumerate(rows):
            summary = row["columns"][title]
            if summary:
                axis.errorbar(summary["mean"], y, xerr=summary["std"] or 0, fmt="o", capsize=3, color="C0")
        axis.set_title(title, fontsize=9)
        axis.set_yticks(range(len(rows)), [row["name"] for row in rows] if i == 0 else [""] * len(rows), fontsize=8)
        axis.set_ylim(len(rows) - 0.5, -0.5)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    return figure


def panels(cells: Sequence[Cell], device: torch.device) -> list[tuple[str, str]]:
    """(row name, HTML tag of a picture) for each row: truth and predictions of the first image, one line per cell."""
    found: dict[str, list[Mapping[str, np.ndarray]]] = {}
    for cell in cells:
        if not finished(cell.result.folder, cell.file):
            continue
        # Without tuned settings, as the cell's figures were obtained.
        loaded = load_any(cell.result.folder, device=device, tuned=False)
        functions = predict_functions(loaded)
        named = {title: functions[name] for title, name in PICTURED.items() if name in functions}
        rows = panel_rows(loaded.task, loaded.run.data, named, device, count=1)
        found.setdefault(cell.row, []).extend(rows)
    return [(name, png_tag(tile(rows), name)) for name, rows in found.items()]


def write_tables(out: Path, grid: Grid, cells: Sequence[Cell], failures: Mapping[str, str]) -> dict[str, Any]:
    """Writes table.md, table.csv and results.json of all finished cells into `out`; returns the results."""
    results = collect(grid, cells, failures)
    write_json(out / "results.json", results, indent=1)
    write_text(out / "table.md", results_markdown(results))
    lines = [
        [row["name"], title, summary["mean"], summary["std"], summary["n"]]
        for row in results["rows"]
        for title, summary in row["columns"].items()
        if summary
    ]
    write_csv(out / "table.csv", [["row", "column", "mean", "std", "n"], *lines])
    return results


def write_results(out: Path, grid: Grid, cells: Sequence[Cell], failures: Mapping[str, str]) -> list[list[str]]:
    """Writes the tables and report.html into `out`; returns the table."""
    results = write_tables(out, grid, cells, failures)
    lines = table(results)
    pictures = panels(cells, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    sections = [("Results", html_table(lines)), ("Plots", png_tag(plots(results), "metrics of all rows"))]
    if failures:
        sections.append(("Failed", html_table([["cell", "reason"], *([name, why] for name, why in failures.items())])))
    sections += [(f"Panels: {name}, one row per seed", picture) for name, picture in pictures]
    write_report(out / "report.html", grid.title, sections)
    return lines
