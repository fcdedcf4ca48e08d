"""Colors of classes and of values, and the legends that explain them."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

ROW = 18
#: Height of a scale of colors, and the number of values written beside it.
SCALE, TICKS = 240, 5


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


def color(values: np.ndarray, high: float, name: str = "viridis") -> np.ndarray:
    """Color-codes (H, W) reals in [0, high] with the matplotlib colormap `name`: (H, W, 3) uint8."""
    import matplotlib

    table = (matplotlib.colormaps[name](np.arange(256))[:, None, :3] * 255).astype(np.uint8)
    share = np.clip(np.nan_to_num(values) / max(high, 1e-6), 0, 1)
    share *= 256
    # matplotlib's own mapping would need 56 bytes per pixel.
    return cv2.applyColorMap(np.minimum(share, 255, out=share).astype(np.uint8), table)


def draw_scale(high: float, unit: str = "", name: str = "viridis") -> np.ndarray:
    """The colors of `color` from 0 (below) to `high`, with values beside them: (H, W, 3) uint8.

    Args:
        high: above 0; the end of the scale.
        unit: written behind each value, e.g. "m".
        name: of the matplotlib colormap.
    """
    font, margin = ImageFont.load_default(12), ROW // 2
    values = [high * i / (TICKS - 1) for i in range(TICKS)]
    texts = [f"{value:.3g} {unit}".rstrip() for value in values]
    width = 44 + max(int(font.getlength(text)) for text in texts)
    sheet = Image.new("RGB", (width, SCALE + 2 * margin), "white")
    bar = color(np.repeat(np.linspace(high, 0, SCALE)[:, None], 20, 1), high, name)
    sheet.paste(Image.fromarray(bar), (8, margin))
    draw = ImageDraw.Draw(sheet)
    for value, text in zip(values, texts, strict=True):
        y = margin + round((SCALE - 1) * (1 - value / high))
        draw.line((28, y, 32, y), fill="black")
        draw.text((36, y), text, fill="black", anchor="lm", font=font)
    return np.asarray(sheet)
