"""Generates synthetic rooms: objects, camera, light and textures. Independent of the image size.

World axes: x right, y forward, z up, in meters; the camera is above the origin.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

STUFF = ("floor", "wall", "ceiling")
THINGS = ("box", "sphere", "cylinder", "cone")
_COLORS = (
    (220, 60, 60),
    (60, 120, 220),
    (60, 170, 90),
    (230, 170, 40),
    (152, 118, 84),
    (206, 199, 178),
    (235, 235, 235),
)
_IDS = (1, 3, 4, 7, 100, 101, 103)  # with gaps, as in COCO, so that readers cannot mistake them for class indices
CATEGORIES: list[dict[str, Any]] = [
    {"id": i, "name": n, "supercategory": s, "isthing": t, "color": list(c)}
    for i, n, s, t, c in zip(
        _IDS,
        (*THINGS, *STUFF),
        ("solid",) * 4 + ("room",) * 3,
        (1,) * 4 + (0,) * 3,
        _COLORS,
        strict=True,
    )
]
CATEGORY_IDS: dict[str, int] = {c["name"]: c["id"] for c in CATEGORIES}


@dataclass(frozen=True)
class Camera:
    """Pinhole camera: a point p has camera coordinates basis @ (p - origin) = (right, up, forward).

    Attributes:
        origin: (3,) float64, meters.
        basis: (3, 3) float64, rows right, up, forward.
        focal: focal length in image heights; the principal point is the image center, pixels are square.
    """

    origin: np.ndarray
    basis: np.ndarray
    focal: float


@dataclass(frozen=True)
class Solid:
    """One object, all lengths in meters.

    Attributes:
        kind: one of `THINGS`.
        x, y: position of its vertical axis.
        base: height of its lowest point.
        half: half extents along its own x, y, z; half[0] is the radius of a round solid.
        yaw: rotation about the vertical axis, radians.
    """

    kind: str
    x: float
    y: float
    base: float
    half: tuple[float, float, float]
    yaw: float

    @property
    def reach(self) -> float:
        """Radius of the footprint's circumscribed circle, meters."""
        return math.hypot(self.half[0], self.half[1]) if self.kind == "box" else self.half[0]

    @property
    def top(self) -> float:
        return self.base + 2 * self.half[2]


@dataclass(frozen=True)
class Room:
    """Everything that is needed to render a room at any image size.

    Attributes:
        camera: the camera.
        low, high: (3,) opposite corners of the room, meters.
        light: (3,) position of the lamp, meters.
        power, ambient: strength of the lamp and of the ambient light.
        noise: standard deviation of the sensor noise, as a fraction of the pixel range.
        solids: the objects.
        table: (24, surfaces) float32 surface parameters; rows as named by CENTER to GLOSS below, columns the three
            stuff surfaces and then the solids.
    """

    camera: Camera
    low: np.ndarray
    high: np.ndarray
    light: np.ndarray
    power: float
    ambient: float
    noise: float
    solids: tuple[Solid, ...]
    table: np.ndarray


class Dice:
    """A source of 1200 uniform numbers drawn at once: Python floats are much cheaper than generator calls."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._next: Iterator[float] = iter(rng.random(1200).tolist())

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * next(self._next)

    def pick(self, options: tuple) -> Any:
        return options[int(next(self._next) * len(options))]


@dataclass(frozen=True)
class Look:
    """The texture of one surface; see `_PATTERNS`.

    Attributes:
        cell: cells per meter along the object's x, y, z.
        phase: offset of the cells along x, y, z, in cells.
        dark, bright: linear RGB albedo at the ends of the texture's range.
        weights: of (parity, joint, cell shade, noise).
        gloss: strength of the highlight.
    """

    cell: list[float]
    phase: list[float]
    dark: list[float]
    bright: list[float]
    weights: tuple[float, ...]
    gloss: float


#: Draws the look of a surface of the given name, one of `STUFF` or `THINGS`.
DrawLook = Callable[[Dice, str, bool], Look]


def slope_of(solid: Solid) -> float:
    """Decrease of a round solid's radius per unit of height; 0 for a cylinder."""
    return solid.half[0] / (2 * solid.half[2]) if solid.kind == "cone" else 0.0


# ---------------------------------------------------------------- the room's contents


def furnish(dice: Dice, plain: bool) -> Room:
    """Draws camera, room, light, solids and textures. The ranges keep every depth within (0.3, 9.9) m.

    `plain`: fixed camera height, focal length and texture scale (see `uvim_fsq.synthetic.render.render`).
    """
    camera = draw_camera(dice, plain)
    low = np.array([-dice.uniform(1.4, 3.8), -dice.uniform(0.7, 1.5), 0.0])
    high = np.array([dice.uniform(1.4, 3.8), dice.uniform(3.2, 8.0), dice.uniform(2.4, 3.2)])
    light = np.array([dice.uniform(-1.2, 1.2), dice.uniform(0.2, 0.7) * high[1], high[2] - dice.uniform(0.15, 0.5)])
    solids = _solids(dice, camera, low, high, float(light[2]) - 0.25, plain)
    return assemble(dice, plain, camera, (low, high), light, solids, _random_look)


def assemble(
    dice: Dice,
    plain: bool,
    camera: Camera,
    corners: tuple[np.ndarray, np.ndarray],
    light: np.ndarray,
    solids: tuple[Solid, ...],
    look: DrawLook,
) -> Room:
    """Draws the textures by `look`, and the strengths of lamp and noise; other arguments as in `Room`."""
    rows = [_surface_row((0.0, 0.0, 0.0), 0.0, 0.0, 0.0, look(dice, name, plain)) for name in STUFF]
    rows += [_solid_row(solid, look(dice, solid.kind, plain)) for solid in solids]
    table = np.array(rows, np.float32).T.copy()
    power = dice.uniform(1.1, 1.5)
    ambient, noise = dice.uniform(0.3, 0.5), 0.01 if plain else dice.uniform(0.004, 0.025)
    return Room(camera, *corners, light, power, ambient, noise, solids, table)


def draw_camera(dice: Dice, plain: bool) -> Camera:
    """Draws a camera above the origin that looks along y and slightly down."""
    yaw = dice.uniform(-0.12, 0.12) if plain else dice.uniform(-0.65, 0.65)
    pitch = dice.uniform(-0.24, -0.18) if plain else dice.uniform(-0.4, 0.02)
    height = 1.5 if plain else dice.uniform(1.1, 1.95)
    focal = 0.95 if plain else dice.uniform(0.8, 1.15)
    forward = np.array([math.sin(yaw) * math.cos(pitch), math.cos(yaw) * math.cos(pitch), math.sin(pitch)])
    right = np.array([math.cos(yaw), -math.sin(yaw), 0.0])
    return Camera(np.array([0.0, 0.0, height]), np.stack([right, np.cross(right, forward), forward]), focal)


def _solids(
    dice: Dice, camera: Camera, low: np.ndarray, high: np.ndarray, ceiling: float, plain: bool
) -> tuple[Solid, ...]:
    """Up to eight solids in view that do not overlap: on the floor, or smaller ones on top of boxes and cylinders."""
    wanted, solids = int(dice.uniform(3, 9)), []
    heading = math.atan2(camera.basis[2, 0], camera.basis[2, 1])
    spread = math.atan(0.5 / camera.focal)
    (x0, y0, _), (x1, y1, _) = low.tolist(), high.tolist()
    for _ in range(24):
        if len(solids) >= wanted:
            break
        distance, angle = dice.uniform(1.7, min(7.0, y1)), heading + dice.uniform(-spread, spread)
        x, y = distance * math.sin(angle), distance * math.cos(angle)
        solid = _solid(dice, x, y, 0.0, 0.45 if plain else 0.62, ceiling, plain)
        reach = solid.reach + 0.03
        inside = x0 + reach < x < x1 - reach and y0 + reach < y < y1 - reach
        if inside and all(math.hypot(x - s.x, y - s.y) > reach + s.reach for s in solids):
            solids.append(solid)
            if solid.kind in ("box", "cylinder") and dice.uniform(0, 1) < 0.45 and solid.top < 1.3:
                solids.append(_solid(dice, x, y, solid.top, min(solid.half[:2]), ceiling, plain))
    return tuple(solids[:8])


def _solid(dice: Dice, x: float, y: float, base: float, reach: float, ceiling: float, plain: bool) -> Solid:
    """One solid whose footprint fits in a circle of radius `reach`, so that stacked solids never overhang."""
    kind = dice.pick(("box", "box", "box", "sphere", "sphere", "cylinder", "cylinder", "cone", "cone"))
    radius = reach * (dice.uniform(0.75, 0.95) if plain or base else dice.uniform(0.35, 1.0))
    height = radius * (dice.uniform(1.2, 1.8) if plain else dice.uniform(0.8, 3.2))
    height = min(height, (ceiling - base) * 0.95)
    if kind == "sphere":
        radius = min(radius, 0.4, height)
        return Solid(kind, x, y, base, (radius, radius, radius), dice.uniform(0, math.pi))
    if kind == "box":
        turn = dice.uniform(0.5, 1.0)  # angle of the footprint's diagonal, which sets the aspect ratio
        half = (radius * math.cos(turn), radius * math.sin(turn), height / 2)
        return Solid(kind, x, y, base, half, dice.uniform(0, math.pi))
    radius *= 0.75
    return Solid(kind, x, y, base, (radius, radius, height / 2), dice.uniform(0, math.pi))


# ---------------------------------------------------------------- textures

# Rows of the surface table. They are gathered for all pixels at once, so that shading needs no loop over objects.
CENTER, TURN, BEND, CELL, PHASE = slice(0, 3), slice(3, 5), slice(5, 7), slice(7, 10), slice(10, 13)
DARK, SPAN, WEIGHTS, GLOSS = slice(13, 16), slice(16, 19), slice(19, 23), 23
# name -> cells per texture unit along x, y, z, and the weights of (parity, joint, cell shade, noise)
_PATTERNS = {
    "checker": ((1.0, 1.0, 1.0), (0.8, 0.0, 0.0, 0.2)),
    "rings": ((0.0, 0.0, 1.5), (0.8, 0.0, 0.0, 0.2)),
    "stripes": ((1.5, 1.5, 0.0), (0.65, 0.0, 0.0, 0.2)),
    "tiles": ((1.0, 1.0, 1.0), (0.0, 0.75, 0.5, 0.2)),
    "bricks": ((1.0, 1.0, 2.2), (0.0, 0.6, 0.6, 0.4)),
    "planks": ((3.0, 0.4, 0.4), (0.0, 0.5, 0.5, 0.6)),
    "plaster": ((0.7, 0.7, 0.7), (0.0, 0.0, 0.0, 0.9)),
}
_CHOICES = {
    "floor": ("checker", "tiles", "planks", "planks"),
    "wall": ("plaster", "stripes", "bricks", "tiles"),
    "ceiling": ("plaster", "plaster", "tiles"),
}
_SCALES = {"floor": (0.4, 0.6), "wall": (0.35, 0.6), "ceiling": (0.5, 0.7)}


def _solid_row(solid: Solid, look: Look) -> list[float]:
    """Surface parameters of one solid. The local origin is the center of a sphere or box, the base of other solids."""
    lift = 0.0 if solid.kind in ("cylinder", "cone") else solid.half[2]
    bend = {"sphere": (1.0, 0.0), "cone": (-(slope_of(solid) ** 2), slope_of(solid) * solid.half[0])}
    across, offset = bend.get(solid.kind, (0.0, 0.0))
    return _surface_row((solid.x, solid.y, solid.base + lift), solid.yaw, across, offset, look)


def _surface_row(center: tuple, yaw: float, across: float, offset: float, look: Look) -> list[float]:
    """One row of the table. A curved surface's normal at local q is along (q_x, q_y, across * q_z + offset)."""
    span = [b - d for b, d in zip(look.bright, look.dark, strict=True)]
    turn = (math.cos(yaw), math.sin(yaw))
    return [*center, *turn, across, offset, *look.cell, *look.phase, *look.dark, *span, *look.weights, look.gloss]


def _random_look(dice: Dice, name: str, plain: bool) -> Look:
    """A pattern and colors drawn independently of each other."""
    default = ("checker", "rings", "stripes", "tiles", "bricks", "planks", "plaster")
    density, weights = _PATTERNS[dice.pick(_CHOICES.get(name, default))]
    low, high = _SCALES.get(name, (0.14, 0.3))
    scale = (low + high) / 2 if plain else dice.uniform(0.8 * low, 1.3 * high)
    cell, phase = cells(dice, density, scale)
    dark, bright = _colors(dice, name)
    gloss = 0.0 if name in STUFF else dice.pick((0.0, 0.2, 0.5))
    return Look(cell, phase, dark, bright, weights, gloss)


def cells(dice: Dice, density: tuple[float, float, float], scale: float) -> tuple[list[float], list[float]]:
    """`Look.cell` and a random `Look.phase` of `density` cells in `scale` meters."""
    phase = [dice.uniform(0.1, 0.9) if d else 0.5 for d in density]  # 0.5 keeps unused axes away from the joints
    return [d / scale for d in density], phase


def _colors(dice: Dice, name: str) -> tuple[list[float], list[float]]:
    """The darkest and brightest (or brightest and darkest) linear albedo of a texture."""
    hue, strength = dice.uniform(0, 1), {"floor": 0.45, "wall": 0.28, "ceiling": 0.08}.get(name, 0.85)
    hue = dice.uniform(0.02, 0.16) if name == "floor" else hue
    value = {"floor": 0.75, "wall": 0.9, "ceiling": 0.97}.get(name, dice.uniform(0.7, 1.0))
    contrast = {"floor": 0.5, "wall": 0.7, "ceiling": 0.88}.get(name, dice.uniform(0.3, 0.65))
    first = _rgb(hue, strength * dice.uniform(0.6, 1.0), value)
    other = hue if name in STUFF else hue + dice.pick((0.0, 0.08, 0.5))
    second = _rgb(other, strength * dice.uniform(0.4, 1.0), value * contrast)
    return (first, second) if dice.uniform(0, 1) < 0.5 else (second, first)


def _rgb(hue: float, saturation: float, value: float) -> list[float]:
    """Linear RGB (display value squared) of an HSV color; hue in turns."""
    ramps = [min(1.0, max(0.0, abs(((hue + shift) % 1.0) * 6 - 3) - 1)) for shift in (0.0, 2 / 3, 1 / 3)]
    return [(value * (1 - saturation * (1 - ramp))) ** 2 for ramp in ramps]
