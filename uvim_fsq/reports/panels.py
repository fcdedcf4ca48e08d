"""Panels: input, prediction, ground truth and error side by side. Knows tasks by their `render` only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from uvim_fsq.config.schema import DataConfig
from uvim_fsq.data.loader import eval_batches
from uvim_fsq.data.sample import Batch, Sample, SampleSource
from uvim_fsq.tasks.base import Task

# Imported where something is drawn: it takes half a second.
if TYPE_CHECKING:
    pass


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
    from uvim_fsq.data.batch import to_device

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
