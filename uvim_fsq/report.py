"""Pictures and pages: panels of predictions, and one self-contained HTML report. Knows tasks by their `render` only."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from uvim_fsq.config import DataConfig
from uvim_fsq.data.loader import eval_batches
from uvim_fsq.data.sample import Batch, Sample, SampleSource
from uvim_fsq.files import read_json_lines, write_text
from uvim_fsq.models import Loaded
from uvim_fsq.tasks.base import Task

# Imported where something is drawn: it takes half a second.
if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CELL = 160
TITLE = 16


def tile(rows: Sequence[Mapping[str, np.ndarray]]) -> np.ndarray:
    """Rows of title -> (H, W, 3) uint8 pictures -> one (H', W', 3) uint8 sheet; titles stand above the first row."""
    titles = list(dict.fromkeys(title for row in rows for title in row))
    sheet = Image.new("RGB", (len(titles) * (CELL + 4), len(rows) * (CELL + 4) + TITLE), "white")
    draw = ImageDraw.Draw(sheet)
    for x, title in enumerate(titles):
        draw.text((x * (CELL + 4) + 4, 2), title, fill="black")
        for y, row in enumerate(rows):
            if title in row:
                picture = Image.fromarray(row[title])
                small = max(picture.size) < CELL
                picture = picture.resize((CELL, CELL), Image.Resampling.NEAREST if small else Image.Resampling.BILINEAR)
                sheet.paste(picture, (x * (CELL + 4), y * (CELL + 4) + TITLE))
    return np.asarray(sheet)


class _Spread:
    """`count` samples of a source, evenly spread: neighbours are often frames of one film."""

    def __init__(self, source: SampleSource, count: int) -> None:
        self.source, self.info = source, source.info
        self.rows = np.linspace(0, len(source) - 1, min(count, len(source))).astype(int)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        return self.source[int(self.rows[index])]


def spread_samples(task: Task, data: DataConfig, count: int) -> tuple[Batch, list[Sample]]:
    """`count` evaluation images as one batch, with their native samples."""
    source = _Spread(task.source(data.root, data.eval_split), count)
    return next(iter(eval_batches(source, task, data, batch_size=count, workers=0, rank=0, world=1)))


@torch.inference_mode()
def panel_rows(
    task: Task, data: DataConfig, predictors: Mapping[str, Any], device: torch.device, count: int = 6
) -> list[dict[str, np.ndarray]]:
    """Per image: the image, the truth and, for each named way of predicting, prediction and error."""
    from uvim_fsq.evaluation import to_device

    batch, samples = spread_samples(task, data, count)
    on_device = to_device(batch, device)
    predicted = {name: predict(on_device).items for name, predict in predictors.items()}
    rows = []
    for i, sample in enumerate(samples):
        row = {"image": as_picture(task.model_image(sample))}
        for name, items in predicted.items():
            item = task.to_size(items[i], sample.image)
            for title, picture in task.render(sample.image, item, sample).items():
                row[title if title == "ground truth" else f"{name} {title}".replace(" prediction", "")] = picture
        rows.append(row)
    return rows


def as_picture(image: np.ndarray) -> np.ndarray:
    """What models see, (H, W, 3) uint8 or float32 in [-1, 1] -> uint8."""
    return image if image.dtype == np.uint8 else ((image + 1) * 127.5).round().clip(0, 255).astype(np.uint8)


def panel_picture(task: Task, data: DataConfig, predict: Any, device: torch.device, count: int = 6) -> np.ndarray:
    """The sheet that training writes beside its curves."""
    return tile(panel_rows(task, data, {"prediction": predict}, device, count))


def png_tag(picture: np.ndarray | Figure, alt: str) -> str:
    """An <img> with the picture inside, so that the page needs no other file."""
    buffer = io.BytesIO()
    if isinstance(picture, np.ndarray):
        Image.fromarray(picture).save(buffer, format="PNG", optimize=True)
    else:
        picture.savefig(buffer, format="png", dpi=100, bbox_inches="tight")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; none if there is no such file."""
    return read_json_lines(run_dir / "metrics.jsonl")


def curve_figure(runs: Mapping[str, Path]) -> Figure:
    """Training loss over steps, one axis per run."""
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
    """Code counts, sorted, and each FSQ channel's level histogram."""
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
        # FSQ's values: an even number of levels is not symmetric about 0.
        values = (np.arange(len(histogram)) - half) / half
        axis.plot(values, [count / total for count in histogram], "o-", label=f"channel {i}")
    axis.set_title("share of each level per channel")
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=7)


def html_table(rows: Sequence[Sequence[str]]) -> str:
    """A table whose first row is the header."""

    def cells(row: Sequence[str], tag: str) -> str:
        return "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in row)

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows[1:])
    return f"<table><tr>{cells(rows[0], 'th')}</tr>{body}</table>"


STYLE = """body{font-family:system-ui,sans-serif;max-width:1250px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse}td,th{padding:.3em .9em;border-bottom:1px solid #ccc;text-align:right}
td:first-child,th:first-child{text-align:left}img{max-width:100%;display:block;margin:1em 0}code{background:#f3f3f3}"""


def write_report(path: Path, title: str, sections: Sequence[tuple[str, str]]) -> None:
    """One self-contained page; `sections` are (heading, HTML)."""
    body = "".join(f"<h2>{html.escape(heading)}</h2>{content}" for heading, content in sections)
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style></head><body><h1>{html.escape(title)}</h1>{body}</body></html>"
    )
    write_text(path, page)


NAMES = {
    "context_only": "oracle, all codes zeroed (context alone)",
    "lm": "LM: image -> tokens -> labels",
    "oracle": "oracle: labels -> tokens -> labels",
}


def result_table(task: Task, result: Mapping[str, Any]) -> list[list[str]]:
    """The task's main figures, the header first; errors also as a share of the baseline's."""
    figures, metric = result["figures"], task.main_metric
    base = figures.get("baseline", {}).get(metric)
    share = ["of the baseline"] if task.smaller_is_better and base is not None else []
    rows = [["", metric, *share, *task.headline, "codebook usage"]]
    for key, title in {"baseline": f"baseline: {result['baseline']}", **NAMES}.items():
        if key not in figures:
            continue
        f = figures[key]
        ratio = [f"{f[metric] / base:.2f}"] if share else []
        usage = f"{f['codebook_usage']:.1%}" if "codebook_usage" in f else ""
        rows.append([title, f"{f[metric]:.3f}", *ratio, *(f"{f.get(name, 0):.3f}" for name in task.headline), usage])
    return rows


def _facts(result: Mapping[str, Any]) -> str:
    facts = {
        "protocol": result["protocol"],
        "data": ", ".join(f"{key} {value}" for key, value in result["data"].items()),
        "task": ", ".join(f"{key}={value}" for key, value in result["task_options"].items()),
        "checkpoint": result["checkpoint_sha256"][:16],
        "versions": ", ".join(f"{key} {value}" for key, value in result["versions"].items()),
    }
    return "<p>" + "<br>".join(f"{key}: <code>{html.escape(value)}</code>" for key, value in facts.items()) + "</p>"


def write_evaluation(
    path: Path, title: str, loaded: Loaded, result: Mapping[str, Any], runs: Mapping[str, Path], device: torch.device
) -> None:
    """The page of one evaluation: figures, panels of eight images, training curves of `runs`, use of the codes."""
    from uvim_fsq.evaluation import ways_to_predict

    task, ways = loaded.task, ways_to_predict(loaded)
    names = {"oracle": "oracle", "context_only": "context alone", "lm": "LM"}
    named = {title: ways[way] for way, title in names.items() if way in ways}
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
