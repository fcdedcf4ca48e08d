"""Panels that show input, prediction, ground truth and error side by side, as rendered by the task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from uvim_fsq.config.schema import DataConfig
from uvim_fsq.data.loader import eval_batches
from uvim_fsq.data.sample import Batch, Sample, SampleSource
from uvim_fsq.tasks.base import Task

#: Side of a cell and height of the title row, in pixels.
CELL = 160
TITLE = 16


def tile(rows: Sequence[Mapping[str, np.ndarray]]) -> np.ndarray:
    """Arranges rows of title -> (H, W, 3) uint8 images in one (H', W', 3) uint8 image, with the titles above."""
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


class _Chosen:
    """The samples of a source at some indices."""

    def __init__(self, source: SampleSource, indices: Sequence[int]) -> None:
        self.source, self.info, self.indices = source, source.info, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Sample:
        return self.source[self.indices[index]]


def spread_indices(total: int, count: int) -> list[int]:
    """`count` evenly spaced indices below `total`. Adjacent samples are often frames of the same video."""
    return np.linspace(0, total - 1, min(count, total)).astype(int).tolist()


def chosen_samples(task: Task, data: DataConfig, indices: Sequence[int] | int) -> tuple[Batch, list[Sample]]:
    """Evaluation images as one batch, with their samples at native size.

    Args:
        task: the task.
        data: where the images are.
        indices: of the images in the split, or how many evenly spaced ones.
    """
    source = task.source(data.root, data.eval_split)
    rows = spread_indices(len(source), indices) if isinstance(indices, int) else list(indices)
    batches = eval_batches(_Chosen(source, rows), task, data, batch_size=len(rows), workers=0, rank=0, world=1)
    batch, samples = next(iter(batches))
    # Sampled tokens depend on the index, and should be those of the evaluation.
    batch["index"] = torch.tensor(rows)
    return batch, samples


@dataclass(frozen=True)
class Panel:
    """A picture of a report.

    Attributes:
        picture: (H, W, 3) uint8.
        caption: what it holds, e.g. the range of its values; may be empty.
    """

    picture: np.ndarray
    caption: str = ""


@torch.inference_mode()
def captioned_rows(
    task: Task, data: DataConfig, predictors: Mapping[str, Any], device: torch.device, indices: Sequence[int] | int
) -> list[tuple[str, dict[str, Panel]]]:
    """For each image its id and, by title, the image, the ground truth, and each prediction and its error.

    Args:
        task: the task, which renders predictions.
        data: where the evaluation images are.
        predictors: name -> predict function.
        device: where these run.
        indices: of the images in the split, or how many evenly spaced ones.
    """
    from uvim_fsq.data.batch import to_device

    batch, samples = chosen_samples(task, data, indices)
    on_device = to_device(batch, device)
    predicted = {name: predict(on_device).items for name, predict in predictors.items()}
    rows: list[tuple[str, dict[str, Panel]]] = []
    for i, sample in enumerate(samples):
        image = as_picture(task.model_image(sample))
        row = {"image": Panel(image, f"{_size(image)}, values {image.min()} to {image.max()}")}
        for name, items in predicted.items():
            item = task.to_size(items[i], sample.image)
            captions = task.captions(item, sample)
            for title, picture in task.render(sample.image, item, sample).items():
                shown = title if title == "ground truth" else f"{name} {title}".replace(" prediction", "")
                row[shown] = Panel(picture, captions.get(title, ""))
        rows.append((sample.id, row))
    return rows


def _size(picture: np.ndarray) -> str:
    return f"{picture.shape[1]} x {picture.shape[0]} pixels"


def panel_rows(
    task: Task, data: DataConfig, predictors: Mapping[str, Any], device: torch.device, count: int = 6
) -> list[dict[str, np.ndarray]]:
    """The pictures of `captioned_rows` of `count` evenly spaced images, by title."""
    rows = captioned_rows(task, data, predictors, device, count)
    return [{title: panel.picture for title, panel in row.items()} for _, row in rows]


def as_picture(image: np.ndarray) -> np.ndarray:
    """A model's input image (H, W, 3), uint8 or float32 in [-1, 1] -> uint8."""
    return image if image.dtype == np.uint8 else ((image + 1) * 127.5).round().clip(0, 255).astype(np.uint8)


def panel_picture(task: Task, data: DataConfig, predict: Any, device: torch.device, count: int = 6) -> np.ndarray:
    """The panel (H, W, 3) uint8 that training saves after each evaluation."""
    return tile(panel_rows(task, data, {"prediction": predict}, device, count))
