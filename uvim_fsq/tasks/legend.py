"""Colors of classes, and the legend that explains them."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

ROW = 18


def class_colors(count: int) -> np.ndarray:
    """(count + 1, 3) uint8 colors: black for void (entry 0), then distinct colors with hues by the golden angle."""
    rows = [(0.0, 0.0, 0.0)]
    for i in range(count):
        value, saturation = (1.0, 0.8, 0.62)[i % 3], (0.62, 0.85, 0.5)[(i // 3) % 3]
        rows.append(colorsys.hsv_to_rgb(i * 0.61803399 % 1.0, saturation, value))
    return (np.array(rows) * 255).round().astype(np.uint8)


def draw_legend(names: Sequence[str], colors: np.ndarray, height: int | None = None) -> np.ndarray:
    """Names beside their colors (N, 3) uint8: (H, W, 3) uint8, in columns of at most `height` pixels."""
    rows = max(1, min(len(names), (height or 20 * ROW) // ROW))
    columns = -(-max(len(names), 1) // rows)
    font = ImageFont.load_default(12)
    width = 30 + max((int(font.getlength(name)) for name in names), default=40)
    sheet = Image.new("RGB", (columns * width, max(rows * ROW, height or 0)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (name, color) in enumerate(zip(names, colors, strict=True)):
        x, y = i // rows * width, i % rows * ROW
        draw.rectangle((x + 4, y + 4, x + 16, y + 15), fill=tuple(int(v) for v in color))
        draw.text((x + 22, y + ROW // 2), name, fill="black", anchor="lm", font=font)
    return np.asarray(sheet)


def beside(picture: np.ndarray, side: np.ndarray) -> np.ndarray:
    """Two pictures (H, W, 3) uint8 next to each other, on white."""
    sheet = np.full((max(picture.shape[0], side.shape[0]), picture.shape[1] + side.shape[1], 3), 255, np.uint8)
    sheet[: picture.shape[0], : picture.shape[1]] = picture
    sheet[: side.shape[0], picture.shape[1] :] = side
    return sheet
