"""Visualizes segments: overlays with class names and outlines of things, and a legend."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from uvim_fsq.data.resize import resize_nearest
from uvim_fsq.tasks.coco_panoptic.segments import Segments
from uvim_fsq.tasks.legend import beside, class_colors, draw_legend

#: Segments that cover a smaller fraction of the image are not labeled with a name.
NAMED_SHARE = 0.01
#: Side in pixels from which things are outlined; in smaller images outlines would hide them.
OUTLINED_FROM = 64


def class_palette(count: int, given: Sequence[Sequence[int]] = ()) -> np.ndarray:
    """(count + 1, 3) uint8: black for void, then `given` if it holds `count` colors (RGB), otherwise distinct ones."""
    return np.array([(0, 0, 0), *given], np.uint8) if len(given) == count else class_colors(count)


def segment_colors(segments: Segments, colors: np.ndarray, is_thing: np.ndarray) -> np.ndarray:
    """(K + 1, 3) uint8 colors by segment: the color of the class, in varying brightness for things."""
    table = np.zeros((len(segments.segment_ids) + 1, 3))
    seen: dict[int, int] = {}
    for i, c in enumerate(int(c) for c in segments.classes):
        number = seen[c] = seen.get(c, -1) + 1
        shade = (1.0, 0.75, 1.2, 0.6, 0.88)[number % 5] if is_thing[c] else 1.0
        table[i + 1] = colors[c] * shade
    return table.clip(0, 255).astype(np.uint8)


def overlay(
    image: np.ndarray,
    segments: Segments,
    names: Sequence[str],
    is_thing: np.ndarray,
    palette: np.ndarray,
    share: float = 0.6,
) -> np.ndarray:
    """The image blended with the colors of its segments, with outlines and names: (H, W, 3) uint8.

    Args:
        image: (H, W, 3) uint8.
        segments: ids 1..K in the order of `segment_ids`, any size.
        names: class names; entry 0 is void.
        is_thing: (C + 1,) bool.
        palette: (C + 1, 3) uint8 colors by class, as from `class_palette`.
        share: weight of the colors.
    """
    ids = resize_nearest(segments.ids, image.shape[:2])
    colors = segment_colors(segments, palette, is_thing)[ids]
    mixed = (image * (1 - share) + colors * share).astype(np.uint8)
    mixed[ids == 0] = image[ids == 0]
    if min(ids.shape) < OUTLINED_FROM:
        return mixed
    edge = np.zeros(ids.shape, bool)
    edge[:, 1:] |= ids[:, 1:] != ids[:, :-1]
    edge[1:] |= ids[1:] != ids[:-1]
    thing = np.concatenate([[False], is_thing[segments.classes]])
    # Draw the outline only on the inside of a thing, so that neighbors keep their own.
    inside = cv2.dilate(edge.astype(np.uint8), np.ones((2, 2), np.uint8)).astype(bool) & thing[ids]
    mixed[inside] = 255
    return _write_names(mixed, ids, segments, names)


def _write_names(picture: np.ndarray, ids: np.ndarray, segments: Segments, names: Sequence[str]) -> np.ndarray:
    if min(picture.shape[:2]) < 200:
        return picture
    sheet = Image.fromarray(picture)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(12)
    area = np.bincount(ids.ravel(), minlength=len(segments.segment_ids) + 1)
    for number in np.argsort(-area[1:])[:40] + 1:
        if area[number] < NAMED_SHARE * ids.size:
            continue
        x, y = _inner_point(ids == number)
        name = names[int(segments.classes[number - 1])]
        draw.text((x, y), name, fill="white", stroke_fill="black", stroke_width=2, anchor="mm", font=font)
    return np.asarray(sheet)


def _inner_point(mask: np.ndarray) -> tuple[int, int]:
    """(x, y) of the pixel of the mask that is farthest from its border, where a name fits best."""
    distance = cv2.distanceTransform(np.pad(mask, 1).astype(np.uint8), cv2.DIST_L2, 3)[1:-1, 1:-1]
    y, x = np.unravel_index(int(distance.argmax()), mask.shape)
    return int(x), int(y)


def legend(
    names: Sequence[str], palette: np.ndarray, classes: Sequence[int] | None = None, height: int | None = None
) -> np.ndarray:
    """Colors and names of the given classes (default: all), (H, W, 3) uint8, in columns of at most `height` pixels."""
    shown = list(range(1, len(names))) if classes is None else list(classes)
    return draw_legend([names[c] for c in shown], palette[shown], height)


def with_legend(picture: np.ndarray, segments: Segments, names: Sequence[str], palette: np.ndarray) -> np.ndarray:
    """`picture` with a legend of its classes on the right."""
    return beside(picture, legend(names, palette, present_classes(segments), picture.shape[0]))


def present_classes(segments: Segments) -> list[int]:
    """The classes of the segments, in order."""
    return sorted({int(c) for c in segments.classes})
