"""Panels that show input, prediction, ground truth and error side by side, as rendered by the task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


class _Spread:
    """`count` evenly spaced samples of a source. Adjacent samples are often frames of the same video."""

    def __init__(self, source: SampleSource, count: int) -> None:
        self.source, self.info = source, source.info
        self.rows = np.linspace(0, len(source) - 1, min(count, len(source))).astype(int)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        return self.source[int(self.rows[index])]


def spread_samples(task: Task, data: DataConfig, count: int) -> tuple[Batch, list[Sample]]:
    """`count` evenly spaced evaluation images as one batch, with their samples at native size."""
    source = _Spread(task.source(data.root, data.eval_split), count)
    return next(iter(eval_batches(source, task, data, batch_size=count, workers=0, rank=0, world=1)))


@torch.inference_mode()
def panel_rows(
    task: Task, data: DataConfig, predictors: Mapping[str, Any], device: torch.device, count: int = 6
) -> list[dict[str, np.ndarray]]:
    """One row per image: the image, the ground truth, and the prediction and error of each predict function.

    Args:
        task: the task, which renders predictions.
        data: where the evaluation images are.
        predictors: name -> predict function.
        device: where these run.
        count: number of images.
    """
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
    """A model's input image (H, W, 3), uint8 or float32 in [-1, 1] -> uint8."""
    return image if image.dtype == np.uint8 else ((image + 1) * 127.5).round().clip(0, 255).astype(np.uint8)


def panel_picture(task: Task, data: DataConfig, predict: Any, device: torch.device, count: int = 6) -> np.ndarray:
    """The panel (H, W, 3) uint8 that training saves after each evaluation."""
    return tile(panel_rows(task, data, {"prediction": predict}, device, count))
