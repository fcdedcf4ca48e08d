"""The HTML report of one evaluation."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from uvim_fsq import processes
from uvim_fsq.checkpoints.loading import LoadedDirect, LoadedRun, load_any
from uvim_fsq.config.schema import LMRun
from uvim_fsq.evaluation.comparison import load_compared
from uvim_fsq.inference.predictions import predict_functions
from uvim_fsq.reports.figures import curve_figure, matrix_figure, read_metrics, usage_figure
from uvim_fsq.reports.html import html_table, png_tag, write_report
from uvim_fsq.reports.panels import panel_rows, tile
from uvim_fsq.tasks.base import Task

NAMES = {
    "context_only": "oracle, all codes zeroed (context alone)",
    "lm": "LM: image -> tokens -> labels",
    "direct": "direct: image -> labels",
    "oracle": "oracle: labels -> tokens -> labels",
}
#: What each row of the table is, in a sentence.
EXPLANATIONS = {
    "baseline": "a trivial prediction, computed from the training split without a model",
    "context_only": "the oracle's decoder with the image but no tokens; what tokens add is measured from here",
    "lm": "the complete model: the LM predicts tokens from the image, and a decoder turns them into labels",
    "direct": "the LM's image encoder with a label head, trained on the task's loss; no oracle and no tokens",
    "oracle": "the oracle encodes and decodes the true labels; other tokens can hardly do better with the same decoder",
}
#: Title of a panel's column -> name of the prediction.
TITLES = {"oracle": "oracle", "context alone": "context_only", "LM": "lm", "direct": "direct"}


def result_table(task: Task, result: Mapping[str, Any]) -> list[list[str]]:
    """The table of the main metrics, header first. Errors are also given relative to the baseline's."""
    figures, metric = result["figures"], task.main_metric
    base = figures.get("baseline", {}).get(metric)
    share = ["of the baseline"] if task.smaller_is_better and base is not None else []
    rows = [["", metric, *share, *task.secondary_metrics, "codebook usage"]]
    for key, title in {"baseline": f"baseline: {result['baseline']}", **NAMES}.items():
        if key not in figures:
            continue
        f = figures[key]
        ratio = [f"{f[metric] / base:.2f}"] if share else []
        usage = f"{f['codebook_usage']:.1%}" if "codebook_usage" in f else ""
        rows.append(
            [title, f"{f[metric]:.3f}", *ratio, *(f"{f.get(name, 0):.3f}" for name in task.secondary_metrics), usage]
        )
    return rows


def _explanations(result: Mapping[str, Any]) -> str:
    """An HTML list of the table's rows, each with its explanation."""
    rows = {name: text for name, text in EXPLANATIONS.items() if name in result["figures"]}
    items = [
        f"<li><b>{html.escape(NAMES.get(name, name))}</b>: {html.escape(text)}</li>" for name, text in rows.items()
    ]
    return f"<ul>{''.join(items)}</ul>"


def _facts(result: Mapping[str, Any]) -> str:
    facts = {
        "protocol": result["protocol"],
        "data": ", ".join(f"{key} {value}" for key, value in result["data"].items()),
        "task": ", ".join(f"{key}={value}" for key, value in result["task_options"].items()),
        "decoding": ", ".join(f"{key}={value}" for key, value in result["decoding"].items()),
        "decoding from": result["decoding_from"],
        "checkpoint": result["checkpoint_sha256"][:16],
        "versions": ", ".join(f"{key} {value}" for key, value in result["versions"].items()),
    }
    return "<p>" + "<br>".join(f"{key}: <code>{html.escape(value)}</code>" for key, value in facts.items()) + "</p>"


def _panels(loaded: LoadedRun | LoadedDirect, device: torch.device) -> list[dict[str, np.ndarray]]:
    """Rows of pictures of eight images, by title."""
    predict_fns = predict_functions(loaded)
    named = {title: predict_fns[name] for title, name in TITLES.items() if name in predict_fns}
    return panel_rows(loaded.task, loaded.run.data, named, device, count=8)


def write_evaluation_page(
    path: Path,
    title: str,
    loaded: LoadedRun | LoadedDirect,
    result: Mapping[str, Any],
    runs: Mapping[str, Path],
    device: torch.device,
    compared: LoadedDirect | None = None,
) -> None:
    """Writes the report of one evaluation: metrics, panels of eight images, training curves and code usage.

    Args:
        path: the HTML file.
        title: its heading.
        loaded: the evaluated checkpoint, for the panels.
        result: from `evaluate_loaded`.
        runs: title -> run directory, for the training curves.
        device: where to run the models.
        compared: the direct run in the result, if there is one.
    """
    task = loaded.task
    wanted = ("image", "ground truth", "oracle", "context alone", "LM", "LM error", "direct", "direct error")
    rows = _panels(loaded, device)
    if compared is not None:
        # Its images may have another size, so it gets a batch of its own.
        rows = [{**other, **own} for own, other in zip(rows, _panels(compared, device), strict=True)]
    panels = png_tag(tile([{key: row[key] for key in wanted if key in row} for row in rows]), ", ".join(wanted))
    legend = task.legend()
    if legend is not None:
        panels += png_tag(legend, "legend")
    results = html_table(result_table(task, result)) + _explanations(result) + _facts(result)
    sections = [("Results", results), ("Panels", panels)]
    matrices = result.get("matrices", {})
    shown = next((name for name in ("lm", "direct", "oracle") if matrices.get(name)), None)
    if shown is not None:
        for name, matrix in matrices[shown].items():
            heading = f"{NAMES[shown]}: {name}"
            sections.append((heading, png_tag(matrix_figure(matrix), f"{heading}, shares of each row")))
    curves = {name: run for name, run in runs.items() if read_metrics(run)}
    if curves:
        sections.append(("Training", png_tag(curve_figure(curves), "training loss")))
    if "oracle" in result["code_counts"]:
        usage = usage_figure(result["code_counts"]["oracle"], result["level_histogram"]["oracle"])
        sections.append(("Codebook", png_tag(usage, "usage")))
    write_report(path, title, sections)


def write_run_page(
    path: Path,
    run_dir: str | Path,
    overrides: Sequence[str],
    result: Mapping[str, Any],
    compare: str | Path | None = None,
) -> None:
    """Writes the report for `result`, the return value of `evaluate(run_dir, overrides, compare=compare)`."""
    device = processes.device()
    loaded = load_any(run_dir, overrides, device)
    runs = {loaded.run.stage: loaded.checkpoint.parent.parent}
    if isinstance(loaded.run, LMRun):
        runs = {"oracle": Path(loaded.run.oracle), **runs}
    compared = load_compared(compare, loaded, overrides, device) if compare is not None else None
    if compared is not None:
        runs["direct"] = compared.checkpoint.parent.parent
    title = f"{loaded.task.name}: {result['protocol']}"
    write_evaluation_page(path, title, loaded, result, runs, device, compared)
