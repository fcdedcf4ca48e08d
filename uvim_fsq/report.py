"""Pictures and pages: panels of predictions, and one self-contained HTML report. Knows tasks by their `render` only."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from uvim_fsq.config import DataConfig
from uvim_fsq.data.loader import eval_batches
from uvim_fsq.data.sample import Batch, Sample
from uvim_fsq.tasks.base import Task

matplotlib.use("Agg")

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


def first_samples(task: Task, data: DataConfig, count: int) -> tuple[Batch, list[Sample]]:
    """The first `count` evaluation images as one batch, with their native samples."""
    source = task.source(data.root, data.eval_split)
    return next(iter(eval_batches(source, task, data, batch_size=count, workers=0, limit=count, rank=0, world=1)))


@torch.inference_mode()
def panel_rows(
    task: Task, data: DataConfig, predictors: Mapping[str, Any], device: torch.device, count: int = 6
) -> list[dict[str, np.ndarray]]:
    """Per image: the image, the truth and, for each named way of predicting, prediction and error."""
    from uvim_fsq.evaluation import to_device

    batch, samples = first_samples(task, data, count)
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
    if isinstance(picture, Figure):
        picture.savefig(buffer, format="png", dpi=100, bbox_inches="tight")
    else:
        Image.fromarray(picture).save(buffer, format="PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; none if there is no such file."""
    file = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines() if line.strip()] if file.is_file() else []


def curve_figure(runs: Mapping[str, Path]) -> Figure:
    """Training loss over steps, one axis per run."""
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
    """Code counts, sorted, and each channel's level histogram."""
    figure = Figure(figsize=(10, 3.2))
    axis = figure.add_subplot(1, 2, 1)
    axis.bar(range(len(counts)), sorted(counts, reverse=True), width=1.0)
    used = sum(count > 0 for count in counts)
    axis.set_title(f"codes by frequency: {used} of {len(counts)} used")
    axis.set_yscale("symlog")
    axis = figure.add_subplot(1, 2, 2)
    for i, histogram in enumerate(levels):
        total, half = max(sum(histogram), 1), len(histogram) // 2
        # FSQ's values: an even number of levels is not symmetric about 0.
        values = (np.arange(len(histogram)) - half) / half
        axis.plot(values, [count / total for count in histogram], "o-", label=f"channel {i}")
    axis.set_title("share of each level per channel")
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=7)
    figure.tight_layout()
    return figure


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
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page)
