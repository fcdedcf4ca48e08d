"""The HTML page of a data set: samples, labels as the models see them, augmentation, statistics and findings."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from uvim_fsq.config.plugins import plugin_code
from uvim_fsq.config.schema import DataConfig
from uvim_fsq.data.loader import derive_seed
from uvim_fsq.data.sample import Sample, SampleSource
from uvim_fsq.data.transforms import JointTransform
from uvim_fsq.errors import UserError
from uvim_fsq.reports.data_statistics import Statistics, statistics_figures, summary
from uvim_fsq.reports.evaluation_sections import panel_html
from uvim_fsq.reports.html import html_table, png_tag, write_report
from uvim_fsq.reports.panels import Panel, as_picture
from uvim_fsq.tasks.base import Categorical, Task

ProgressCallback = Callable[[int, int], None]
#: Label size of the page, at most; more cannot be seen in a panel.
SIDE = 256
#: Samples of which statistics are computed, at most, evenly spaced.
MEASURED = 500
#: Augmented versions of each sample, and the seed of the first.
AUGMENTED, SEED = 2, 0
#: Findings shown.
FINDINGS = 200
#: Charts stand next to each other where there is room.
BESIDE = "display:inline-block;vertical-align:top;margin-right:1em;max-width:100%"
#: Color of pixels without a label.
UNLABELED = (128, 128, 128)


def perfect_prediction(task: Task, labels: Mapping[str, np.ndarray]) -> Any:
    """What `Task.decode` makes of logits that equal the labels, (S, S[, C]) as from `Task.encode`."""
    logits: dict[str, torch.Tensor] = {}
    for name, channel in task.label_channels.items():
        values = torch.from_numpy(np.ascontiguousarray(labels[name]))
        if isinstance(channel, Categorical):
            indices = values.long().clamp(min=0)[..., None]
            logits[name] = torch.zeros(1, *values.shape, channel.num_classes).scatter_(-1, indices[None], 100.0)
        else:
            logits[name] = (values.float() / 127.5 - 1 if values.dtype == torch.uint8 else values.float())[None]
    (prediction,) = task.decode(logits)
    return prediction


def label_picture(task: Task, image: np.ndarray, labels: Mapping[str, np.ndarray]) -> np.ndarray:
    """Labels drawn as a perfect prediction of them would be, so that every task's own `render` serves.

    Args:
        image: (S, S, 3) uint8.
        labels: as from `Task.encode`, (S, S[, C]).

    Returns (S, S, 3) uint8; pixels without a label in any channel are gray.
    """
    channels = task.label_channels.items()
    unlabeled = [labels[name] < 0 for name, channel in channels if isinstance(channel, Categorical)]
    prediction = task.to_size(perfect_prediction(task, labels), image)
    picture = np.array(task.render(image, prediction)["prediction"])
    if len(unlabeled) == len(channels):
        picture[np.logical_and.reduce(unlabeled)] = UNLABELED
    return picture


class _View:
    """Prepares the samples of one split for the page."""

    def __init__(self, task: Task, data: DataConfig) -> None:
        small = replace(data, image_size=min(data.image_size, SIDE))
        self.task = task
        self.plain, self.augment = (JointTransform(small, task, train=train) for train in (False, True))

    def labels(self, sample: Sample) -> dict[str, np.ndarray]:
        """The labels of the whole sample, (S, S[, C])."""
        return self.plain.encode(self.plain.resample(self._whole(sample), 0))[1]

    def row(self, sample: Sample, index: int) -> dict[str, Panel]:
        """By title: image, ground truth, labels as encoded, augmented images and labels."""
        task, view = self.task, self._whole(sample)
        resized = self.plain.resample(view, 0)
        labels = task.encode(resized)
        prediction = task.to_size(perfect_prediction(task, labels), view.image)
        pictures = task.render(view.image, prediction, view)
        row = {"image": Panel(view.image)}
        if "ground truth" in pictures:
            row["ground truth"] = Panel(
                pictures["ground truth"], task.captions(prediction, view).get("ground truth", "")
            )
        row["encoded"] = Panel(label_picture(task, resized.image, labels))
        for number in range(AUGMENTED):
            changed = self.augment.resample(sample, derive_seed(SEED, number, index))
            row[f"augmented {number + 1}"] = Panel(as_picture(task.model_image(changed)))
            row[f"its labels {number + 1}"] = Panel(label_picture(task, changed.image, task.encode(changed)))
        return row

    def _whole(self, sample: Sample) -> Sample:
        try:
            return self.task.evaluation_view(sample)
        except UserError:  # the protocol does not apply to this data
            return sample


def _spaced(count: int, most: int) -> list[int]:
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(int)).tolist() if count else []


def _split_sections(
    task: Task, data: DataConfig, split: str, num: int, progress: ProgressCallback
) -> list[tuple[str, str]]:
    """The sections of one split. Samples that cannot be read are named and left out."""
    source = task.source(data.root, split)
    view, found, failed = _View(task, data), Statistics(), dict[str, None]()
    measured, shown = _spaced(len(source), MEASURED), _spaced(len(source), num)
    for done, index in enumerate(measured):
        progress(done, len(measured) + len(shown))
        sample = _read(source, index, failed)
        if sample is not None:
            found.add(task, sample, view.labels(sample))
    rows: list[str] = []
    for done, index in enumerate(shown):
        progress(len(measured) + done, len(measured) + len(shown))
        sample = _read(source, index, failed)
        if sample is not None:
            size = f"{sample.image.shape[0]} x {sample.image.shape[1]} pixels"
            rows.append(panel_html(f"{sample.id}, {size}", view.row(sample, index)))
    sections = [(f"{split}: data", html_table(_facts(source)))]
    if failed:
        sections.append((f"{split}: samples that cannot be read", html_list(list(failed))))
    if rows:
        sections.append((f"{split}: samples", "".join(rows)))
    if found.sizes:
        note = "" if len(measured) == len(source) else f"<p>{len(measured)} evenly spaced samples of {len(source)}.</p>"
        figures = statistics_figures(task, found)
        drawn = "".join(
            f'<div style="{BESIDE}"><h3>{html.escape(title)}</h3>{png_tag(figure, title)}</div>'
            for title, figure in figures
        )
        sections.append((f"{split}: statistics", note + html_table(summary(found)) + drawn))
    return sections


def _read(source: SampleSource, index: int, failed: dict[str, None]) -> Sample | None:
    try:
        return source[index]
    except UserError as error:
        failed[str(error)] = None
        return None


def _facts(source: SampleSource) -> list[list[str]]:
    facts = {"count": len(source), **source.info}
    return [["", ""], *([key.replace("_", " "), str(value)] for key, value in facts.items() if value is not None)]


def html_list(lines: Sequence[str]) -> str:
    """An HTML list of the first `FINDINGS` lines, and the number of the others."""
    items = "".join(f"<li>{html.escape(line)}</li>" for line in lines[:FINDINGS])
    more = f"<p>and {len(lines) - FINDINGS} more</p>" if len(lines) > FINDINGS else ""
    return f"<ul>{items}</ul>{more}"


def write_data_page(
    path: Path,
    task: Task,
    data: DataConfig,
    splits: Sequence[str],
    *,
    num: int = 8,
    findings: Mapping[str, Sequence[str]] | None = None,
    progress: ProgressCallback = lambda done, total: None,
) -> None:
    """Writes the page of a data set.

    Args:
        path: the HTML file.
        data: its root, and how samples are augmented; label maps are at most `SIDE` pixels wide on the page.
        num: samples shown per split, evenly spaced.
        findings: split -> what `uvim-fsq data check` found wrong, if it has been run. A split that cannot be opened is
            then among them; otherwise it is an error.
        progress: called with (samples done, samples in the split).

    Raises UserError if a split cannot be opened or a plugin's method fails.
    """
    sections: list[tuple[str, str]] = []
    for split, lines in (findings or {}).items():
        sections.append((f"{split}: findings", html_list(lines) if lines else "<p>Nothing found.</p>"))
    legend = task.legend()
    for split in splits:
        try:
            with plugin_code(f"task {task.name}, on the page of {split}"):
                sections += _split_sections(task, data, split, num, progress)
        except UserError:
            if findings is None:
                raise
    explained = (
        "<p>ground truth: at the size of the image; encoded: the labels that a model gets, drawn as if they were "
        "predicted perfectly, gray without a label; augmented: what training makes of the sample.</p>"
    )
    if legend is not None:
        explained += png_tag(legend, "legend")
    write_report(path, f"{task.name}: {data.root}", [("What is shown", explained), *sections])
