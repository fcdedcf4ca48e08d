"""The HTML report of one evaluation."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from uvim_fsq import processes
from uvim_fsq.checkpoints.loading import LoadedRun, load_checkpoint
from uvim_fsq.config.schema import LMRun
from uvim_fsq.inference.predictions import predict_functions
from uvim_fsq.reports.figures import curve_figure, read_metrics, usage_figure
from uvim_fsq.reports.html import html_table, png_tag, write_report
from uvim_fsq.reports.panels import panel_rows, tile
from uvim_fsq.tasks.base import Task

NAMES = {
    "context_only": "oracle, all codes zeroed (context alone)",
    "lm": "LM: image -> tokens -> labels",
    "oracle": "oracle: labels -> tokens -> labels",
}


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


def write_evaluation_page(
    path: Path, title: str, loaded: LoadedRun, result: Mapping[str, Any], runs: Mapping[str, Path], device: torch.device
) -> None:
    """Writes the report of one evaluation: metrics, panels of eight images, training curves and code usage.

    Args:
        path: the HTML file.
        title: its heading.
        loaded: the evaluated checkpoint, for the panels.
        result: from `evaluate_loaded`.
        runs: title -> run directory, for the training curves.
        device: where to run the models.
    """
    task, predict_fns = loaded.task, predict_functions(loaded)
    titles = {"oracle": "oracle", "context_only": "context alone", "lm": "LM"}
    named = {title: predict_fns[name] for name, title in titles.items() if name in predict_fns}
    wanted = ("image", "ground truth", "oracle", "context alone", "LM", "LM error")
    rows = panel_rows(task, loaded.run.data, named, device, count=8)
    panels = png_tag(tile([{key: row[key] for key in wanted if key in row} for row in rows]), ", ".join(wanted))
    legend = task.legend()
    if legend is not None:
        panels += png_tag(legend, "legend")
    sections = [("Results", html_table(result_table(task, result)) + _facts(result)), ("Panels", panels)]
    curves = {name: run for name, run in runs.items() if read_metrics(run)}
    if curves:
        sections.append(("Training", png_tag(curve_figure(curves), "training loss")))
    usage = usage_figure(result["code_counts"]["oracle"], result["level_histogram"]["oracle"])
    write_report(path, title, [*sections, ("Codebook", png_tag(usage, "usage"))])


def write_run_page(path: Path, run_dir: str | Path, overrides: Sequence[str], result: Mapping[str, Any]) -> None:
    """Writes the report for `result`, the return value of `evaluate(run_dir, overrides)`."""
    device = processes.device()
    loaded = load_checkpoint(run_dir, overrides, device)
    runs = {loaded.run.stage: loaded.checkpoint.parent.parent}
    if isinstance(loaded.run, LMRun):
        runs = {"oracle": Path(loaded.run.oracle), **runs}
    write_evaluation_page(path, f"{loaded.task.name}: {result['protocol']}", loaded, result, runs, device)
