"""The HTML report of one evaluation."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from uvim_fsq import processes
from uvim_fsq.checkpoints.loading import LoadedDirect, LoadedRun, load_any
from uvim_fsq.config.schema import LMRun
from uvim_fsq.evaluation.comparison import load_compared
from uvim_fsq.evaluation.examination import Examined
from uvim_fsq.inference.predictions import predict_functions
from uvim_fsq.reports.evaluation_sections import (
    IMPORTANT,
    SHORT,
    Section,
    breakdown_sections,
    calibration_section,
    charts,
    class_section,
    decoding_section,
    distribution_section,
    extremes,
    panel_html,
    ranked_way,
    token_section,
)
from uvim_fsq.reports.figures import curve_figure, matrix_figure, read_metrics
from uvim_fsq.reports.html import chart_tag, html_table, png_tag, write_report
from uvim_fsq.reports.panels import Panel, captioned_rows
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
#: Titles of panels in order.
COLUMNS = (
    "image",
    "ground truth",
    "oracle",
    "context alone",
    "LM",
    "LM error",
    "direct",
    "direct error",
)
#: Evenly spaced images that are shown.
SPREAD = 6


def result_table(task: Task, result: Mapping[str, Any]) -> list[list[str]]:
    """The table of the main metrics, header first. Errors are also given relative to the baseline's."""
    figures, metric = result["figures"], task.main_metric
    base = figures.get("baseline", {}).get(metric)
    share = ["of the baseline"] if task.smaller_is_better and base else []
    rows = [["", metric, *share, *task.secondary_metrics, "codebook usage"]]
    for key, title in {"baseline": f"baseline: {result['baseline']}", **NAMES}.items():
        if key not in figures:
            continue
        f = figures[key]
        ratio = [f"{f[metric] / base:.2f}"] if share else []
        usage = f"{f['codebook_usage']:.1%}" if "codebook_usage" in f else ""
        secondary = [f"{f[name]:.3f}" if name in f else "" for name in task.secondary_metrics]
        rows.append([title, f"{f[metric]:.3f}", *ratio, *secondary, usage])
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
        "evaluated": f"{result['images']} images" + (f", the first {result['limit']} only" if result["limit"] else ""),
        "task": ", ".join(f"{key}={value}" for key, value in result["task_options"].items()),
        "decoding": ", ".join(f"{key}={value}" for key, value in result["decoding"].items()),
        "decoding from": result["decoding_from"],
        "checkpoint": result["checkpoint_sha256"][:16],
        "versions": ", ".join(f"{key} {value}" for key, value in result["versions"].items()),
    }
    return "<p>" + "<br>".join(f"{key}: <code>{html.escape(value)}</code>" for key, value in facts.items()) + "</p>"


class _Pictures:
    """Makes the panels of a checkpoint and, if there is one, of the compared direct run."""

    def __init__(self, loaded: LoadedRun | LoadedDirect, compared: LoadedDirect | None, device: torch.device) -> None:
        self.runs, self.device = [run for run in (loaded, compared) if run is not None], device
        self.functions = [predict_functions(run) for run in self.runs]

    def rows(self, indices: Sequence[int] | int) -> list[tuple[str, dict[str, Panel]]]:
        """Id and panels, by title, of each image: of some indices in the split, or a number of evenly spaced ones."""
        parts: list[list[tuple[str, dict[str, Panel]]]] = []
        # Each run gets a batch of its own, because its images may have another size.
        for run, functions in zip(self.runs, self.functions, strict=True):
            named = {title: functions[name] for title, name in TITLES.items() if name in functions}
            parts.append(captioned_rows(run.task, run.run.data, named, self.device, indices))
        found: list[tuple[str, dict[str, Panel]]] = []
        for rows in zip(*parts, strict=True):
            merged = {title: panel for _, row in reversed(rows) for title, panel in row.items()}
            found.append((rows[0][0], {title: merged[title] for title in COLUMNS if title in merged}))
        return found


def _panel_sections(pictures: _Pictures, task: Task, examined: Mapping[str, Examined]) -> list[Section]:
    """The best, median and worst images, and evenly spaced ones."""
    way, sections = ranked_way(examined), list[Section]()
    legend = task.legend()
    after = png_tag(legend, "legend") if legend is not None else ""
    if way is not None:
        chosen = extremes(examined[way].values, smaller_is_better=task.smaller_is_better)
        rows = pictures.rows([index for _, index, _ in chosen])
        content = "".join(
            panel_html(f"{kind}: {name}, {task.main_metric} {value:.3f}", row)
            for (kind, _, value), (name, row) in zip(chosen, rows, strict=True)
        )
        title = f"Best, median and worst images by {task.main_metric} of {SHORT[way]}"
        sections.append((title, content + after))
    elif examined:
        text = f"<p>{html.escape(task.main_metric)} is not defined for a single image, so images have no order.</p>"
        sections.append(("Best, median and worst images", text))
    spread = "".join(panel_html(name, row) for name, row in pictures.rows(SPREAD))
    return [*sections, ("Evenly spaced images", spread + after)]


def write_evaluation_page(
    path: Path,
    title: str,
    loaded: LoadedRun | LoadedDirect,
    result: Mapping[str, Any],
    runs: Mapping[str, Path],
    device: torch.device,
    compared: LoadedDirect | None = None,
    examined: Mapping[str, Examined] | None = None,
) -> None:
    """Writes the report of one evaluation: metrics, panels, classes, tokens, training curves.

    Args:
        path: the HTML file.
        title: its heading.
        loaded: the evaluated checkpoint, for the panels.
        result: from `evaluate_loaded`.
        runs: title -> run directory, for the training curves.
        device: where to run the models.
        compared: the direct run in the result, if there is one.
        examined: what `evaluate_loaded` found besides the result; what needs it is left out without it.
    """
    task, examined = loaded.task, examined or {}
    results = html_table(result_table(task, result)) + _explanations(result) + _facts(result)
    sections: list[Section | None] = [("Results", results)]
    sections += _panel_sections(_Pictures(loaded, compared, device), task, examined)
    if examined:
        sections.append(distribution_section(task, examined))
    sections.append(class_section(result["figures"]))
    if examined:
        sections += breakdown_sections(examined)
    matrices = result.get("matrices", {})
    shown = next((name for name in IMPORTANT if matrices.get(name)), None)
    if shown is not None:
        for name, matrix in matrices[shown].items():
            heading = f"{NAMES[shown]}: {name}"
            sections.append((heading, chart_tag(matrix_figure(matrix), f"{heading}, shares of each row")))
    if "lm" in result["figures"]:
        if "lm" in examined:
            sections.append(calibration_section(examined["lm"]))
        sections.append(decoding_section(task, result))
    sections.append(token_section(result, examined))
    curves = {name: curve_figure(run) for name, run in runs.items() if read_metrics(run)}
    if curves:
        drawn = [(name, chart_tag(curve, f"{name}: training loss")) for name, curve in curves.items()]
        sections.append(("Training", charts(drawn)))
    write_report(path, title, [section for section in sections if section is not None])


def write_run_page(
    path: Path,
    run_dir: str | Path,
    overrides: Sequence[str],
    result: Mapping[str, Any],
    compare: str | Path | None = None,
    examined: Mapping[str, Examined] | None = None,
) -> None:
    """Writes the report for `result`, the return value of `evaluate` with the same arguments."""
    device = processes.device()
    loaded = load_any(run_dir, overrides, device)
    runs = {loaded.run.stage: loaded.checkpoint.parent.parent}
    if isinstance(loaded.run, LMRun):
        runs = {"oracle": Path(loaded.run.oracle), **runs}
    compared = load_compared(compare, loaded, overrides, device) if compare is not None else None
    if compared is not None:
        runs["direct"] = compared.checkpoint.parent.parent
    title = f"{loaded.task.name}: {result['protocol']}"
    write_evaluation_page(path, title, loaded, result, runs, device, compared, examined)
