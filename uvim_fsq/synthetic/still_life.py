"""Generates still lifes: a few large objects of materials that have their own texture and a few likely colors.

The kinds of objects and surfaces have their own materials (a sphere is a fruit or a ball, a cone is a plant or a road
cone), and a material has its own texture and a few likely hues of equal luma. So the color of a surface is a question
with several good answers: a gray image shows the material, but not which of its hues was drawn.

Objects stand in bands of increasing distance, so that the order of their centers in the image is nearly always clear.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from uvim_fsq.synthetic.rooms import STUFF, THINGS, Camera, Dice, Look, Room, Solid, assemble, cells, draw_camera

#: Ranges of the distance of an object, meters.
_BANDS = ((2.65, 2.85), (3.4, 3.7), (4.5, 4.9), (5.8, 6.3))
_ATTEMPTS = 24  # to place one object beside the others
#: Luma weights of display RGB: those of the gray images of the colorization task.
_LUMA = (0.2989, 0.5870, 0.1140)

Hue = tuple[float, float]


@dataclass(frozen=True)
class Material:
    """A texture, and the colors it comes in.

    Attributes:
        density: cells per texture unit along x, y, z.
        unit: length of the texture unit, meters.
        weights: of (parity, joint, cell shade, noise); see `Look`.
        luma: range of the display luma of the texture's bright end.
        contrast: luma of the dark end as a fraction of the bright end's.
        hues: (hue in turns, chroma) of each likely color; chroma is the difference between the largest and the smallest
            display channel, as a fraction of the luma.
        gloss: strength of the highlight.
    """

    density: tuple[float, float, float]
    unit: float
    weights: tuple[float, float, float, float]
    luma: tuple[float, float]
    contrast: float
    hues: tuple[Hue, ...]
    gloss: float = 0.0


# Likely (hue, chroma) of a few substances.
_WOOD = ((0.08, 0.65), (0.03, 0.65), (0.115, 0.5))  # oak, mahogany, pine
_CLAY = ((0.02, 0.8), (0.105, 0.5))  # red and sand-colored bricks
_TILE = ((0.035, 0.9), (0.08, 0.65))
_PAINT = ((0.11, 0.3), (0.57, 0.35), (0.33, 0.28), (0.97, 0.3))  # cream, sky, sage, rose
_PAPER = ((0.6, 0.4), (0.0, 0.35))
_WHITE = ((0.11, 0.04),)
_CLOTH = ((0.99, 1.2), (0.6, 1.1), (0.36, 0.9))  # red, blue, green
_FRUIT = ((0.065, 1.5), (0.0, 1.4), (0.24, 1.2))  # orange, red apple, lime
_MELON = ((0.3, 1.0), (0.14, 1.1))  # green, yellow
_METAL = ((0.58, 0.15), (0.11, 0.8), (0.05, 0.8))  # steel, brass, copper
_GLAZE = ((0.6, 0.9), (0.04, 0.9))  # blue, terracotta
_LEAF = ((0.33, 1.1), (0.22, 1.1), (0.07, 1.3))  # dark green, light green, autumn
_SIGNAL = ((0.04, 1.5),)

MATERIALS: dict[str, Material] = {
    "floorboards": Material((3.0, 0.4, 0.4), 0.6, (0.0, 0.5, 0.5, 0.6), (0.5, 0.62), 0.55, _WOOD),
    "stone": Material((1.0, 1.0, 1.0), 0.6, (0.85, 0.0, 0.0, 0.15), (0.7, 0.8), 0.4, _WHITE),
    "floor tiles": Material((1.0, 1.0, 1.0), 0.5, (0.0, 0.7, 0.3, 0.2), (0.5, 0.6), 0.6, _TILE),
    "plaster": Material((0.7, 0.7, 0.7), 0.5, (0.0, 0.0, 0.0, 0.9), (0.72, 0.86), 0.8, _PAINT),
    "wallpaper": Material((1.5, 1.5, 0.0), 0.6, (0.75, 0.0, 0.0, 0.1), (0.7, 0.84), 0.75, _PAPER),
    "brick wall": Material((1.0, 1.0, 2.2), 0.5, (0.0, 0.6, 0.5, 0.3), (0.5, 0.6), 0.6, _CLAY),
    "whitewash": Material((0.7, 0.7, 0.7), 0.6, (0.0, 0.0, 0.0, 0.9), (0.9, 0.96), 0.9, _WHITE),
    "crate": Material((0.4, 0.4, 2.4), 0.6, (0.0, 0.7, 0.4, 0.4), (0.5, 0.65), 0.5, _WOOD),
    "bricks": Material((1.2, 1.2, 2.4), 0.5, (0.0, 0.8, 0.4, 0.2), (0.45, 0.55), 0.55, _CLAY),
    "cloth": Material((2.0, 2.0, 2.0), 0.5, (0.9, 0.0, 0.0, 0.1), (0.5, 0.6), 0.45, _CLOTH),
    "fruit skin": Material((0.9, 0.9, 0.9), 0.5, (0.0, 0.0, 0.0, 0.6), (0.48, 0.6), 0.8, _FRUIT, 0.5),
    "melon rind": Material((1.6, 1.6, 0.0), 0.5, (0.8, 0.0, 0.0, 0.2), (0.5, 0.6), 0.6, _MELON, 0.3),
    "metal": Material((0.0, 0.0, 6.0), 0.5, (0.0, 0.0, 0.9, 0.1), (0.6, 0.7), 0.75, _METAL, 0.9),
    "pottery": Material((0.0, 0.0, 1.6), 0.5, (0.85, 0.0, 0.0, 0.15), (0.6, 0.72), 0.5, _GLAZE, 0.2),
    "leaves": Material((4.0, 4.0, 4.0), 0.5, (0.0, 0.0, 1.0, 0.3), (0.45, 0.55), 0.35, _LEAF),
    "road cone": Material((0.0, 0.0, 1.8), 0.5, (0.9, 0.0, 0.0, 0.05), (0.75, 0.85), 0.6, _SIGNAL),
}
#: Surface -> its materials, each equally likely.
CHOICES: dict[str, tuple[str, ...]] = {
    "floor": ("floorboards", "stone", "floor tiles"),
    "wall": ("plaster", "wallpaper", "brick wall"),
    "ceiling": ("whitewash",),
    "box": ("crate", "bricks", "cloth"),
    "sphere": ("fruit skin", "melon rind"),
    "cylinder": ("metal", "pottery"),
    "cone": ("leaves", "road cone"),
}
assert set(CHOICES) == {*STUFF, *THINGS}


def furnish(dice: Dice, plain: bool) -> Room:
    """Draws camera, room, light, objects and materials. The ranges keep every depth within (0.3, 9.9) m.

    `plain`: as in `uvim_fsq.synthetic.rooms.furnish`.
    """
    camera = draw_camera(dice, plain)
    low = np.array([-dice.uniform(3.9, 4.4), -dice.uniform(0.7, 1.5), 0.0])
    high = np.array([dice.uniform(3.9, 4.4), dice.uniform(7.4, 8.0), dice.uniform(2.4, 3.2)])
    light = np.array([dice.uniform(-1.2, 1.2), dice.uniform(0.2, 0.5) * high[1], high[2] - dice.uniform(0.15, 0.4)])
    solids = _arrange(dice, camera, low, high, float(light[2]) - 0.25)
    return assemble(dice, plain, camera, (low, high), light, solids, draw_look)


def _arrange(dice: Dice, camera: Camera, low: np.ndarray, high: np.ndarray, ceiling: float) -> tuple[Solid, ...]:
    """Two to four solids on the floor in different bands of distance, wholly in view and side by side.

    If the camera is turned far to one side, the farthest ones may find no place in the room.
    """
    bands = list(_BANDS)
    for _ in range(int(dice.uniform(0, 3))):
        bands.pop(int(dice.uniform(0, len(bands))))
    solids: list[Solid] = []
    places: list[tuple[float, float]] = []  # center and half width of the solids, as tangents
    heading = math.atan2(camera.basis[2, 0], camera.basis[2, 1])
    for near, far in bands:
        distance, width = dice.uniform(near, far), dice.uniform(0.135, 0.165)
        spread = 0.46 / camera.focal - width
        for _ in range(_ATTEMPTS):
            place = dice.uniform(-spread, spread)
            angle = heading + math.atan(place)
            x, y = distance * math.sin(angle), distance * math.cos(angle)
            reach = 1.05 * width * distance
            inside = low[0] + reach < x < high[0] - reach and y < high[1] - reach
            if inside and all(abs(place - other) > 0.7 * (width + half) for other, half in places):
                places.append((place, width))
                solids.append(_solid(dice, x, y, width * distance, ceiling))
                break
    return tuple(solids)


def _solid(dice: Dice, x: float, y: float, radius: float, ceiling: float) -> Solid:
    """One solid whose footprint fits in a circle of the given radius, meters."""
    kind, yaw = dice.pick(THINGS), dice.uniform(0, math.pi)
    height = min(radius * dice.uniform(1.9, 2.5), 0.9 * ceiling)
    if kind == "sphere":
        half = (radius, radius, radius)
    elif kind == "box":
        turn = dice.uniform(0.6, math.pi / 4)  # angle of the footprint's diagonal, which sets the aspect ratio
        half = (radius * math.cos(turn), radius * math.sin(turn), 0.42 * height)
    else:
        radius *= 0.8 if kind == "cylinder" else 1.0
        half = (radius, radius, height / 2)
    return Solid(kind, x, y, 0.0, half, yaw)


def draw_look(dice: Dice, name: str, plain: bool) -> Look:
    """Draws one of the materials of a surface, its luma and one of its hues."""
    material = MATERIALS[dice.pick(CHOICES[name])]
    scale = material.unit * (1.0 if plain else dice.uniform(0.7, 1.3))
    cell, phase = cells(dice, material.density, scale)
    luma = dice.uniform(*material.luma)
    hue, chroma = dice.pick(material.hues)
    hue += dice.uniform(-0.012, 0.012)
    bright = albedo(hue, chroma, luma)
    dark = albedo(hue, chroma, luma * material.contrast)
    return Look(cell, phase, dark, bright, material.weights, material.gloss)


def albedo(hue: float, chroma: float, luma: float) -> list[float]:
    """Linear RGB (display value squared) of a display color.

    Args:
        hue: in turns.
        chroma: largest minus smallest channel, as a fraction of the luma; reduced where a channel would leave [0, 1].
        luma: display luma, in [0, 1].
    """
    ramps = [min(1.0, max(0.0, abs(((hue + shift) % 1.0) * 6 - 3) - 1)) for shift in (0.0, 2 / 3, 1 / 3)]
    mean = sum(weight * ramp for weight, ramp in zip(_LUMA, ramps, strict=True)) / sum(_LUMA)
    offsets = [ramp - mean for ramp in ramps]  # of luma 0, and largest minus smallest 1
    most = min((1 - luma) / max(offsets), luma / -min(offsets))
    return [(luma + min(chroma * luma, most) * offset) ** 2 for offset in offsets]
