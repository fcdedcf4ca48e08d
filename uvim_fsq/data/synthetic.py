"""A vectorised ray caster of furnished rooms: pictures whose depth and segments are exact by construction.

The same (seed, index) is the same room at every picture size. Knows nothing of files, data sets or models.

World axes: x to the right, y forward, z up, metres; the camera stands above the origin. Depth is z-depth (distance
along the optical axis, as NYU Depth v2 records it), not distance along the ray.
Letters: H, W picture; S rays a pixel (its centre, and its lower right corner where colour is anti-aliased);
N = S * H * W.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

STUFF = ("floor", "wall", "ceiling")
THINGS = ("box", "sphere", "cylinder", "cone")
_COLORS = ((152, 118, 84), (206, 199, 178), (235, 235, 235), (220, 60, 60), (60, 120, 220), (60, 170, 90), (230, 170, 40))
_THING_IDS = (1, 3, 4, 7)  # with gaps, as in COCO, so that readers cannot mistake them for class indices
CATEGORIES: list[dict[str, Any]] = [
    {"id": i, "name": n, "supercategory": s, "isthing": t, "color": list(c)}
    for i, n, s, t, c in zip(
        (*_THING_IDS, 100, 101, 103),
        (*THINGS, *STUFF),
        ("solid",) * 4 + ("room",) * 3,
        (1,) * 4 + (0,) * 3,
        (*_COLORS[3:], *_COLORS[:3]),
        strict=True,
    )
]
CATEGORY_IDS: dict[str, int] = {c["name"]: c["id"] for c in CATEGORIES}

SMOOTHED_SIDE = 64  # pictures whose longer side is at most this are anti-aliased
_CURVED = 3  # face code of a curved surface; 0, 1, 2 are flat faces across local x, y, z


@dataclass(frozen=True)
class Camera:
    """Pinhole camera: a point p has camera coordinates basis @ (p - origin) = (right, up, forward).

    Attributes:
        origin: (3,) float64, metres.
        basis: (3, 3) float64, rows right, up, forward.
        focal: focal length in picture heights; the principal point is the picture's centre, pixels are square.
    """

    origin: np.ndarray
    basis: np.ndarray
    focal: float


@dataclass(frozen=True)
class Scene:
    """One rendered room.

    Attributes:
        image: (H, W, 3) uint8 RGB.
        depth: (H, W) float32 z-depth in metres at the pixel centres, within (0.3, 9.9), no holes.
        segments: (H, W) int32 ids 1..K at the pixel centres; every id has at least one pixel.
        segments_info: K dicts with `id`, `category_id` (see `CATEGORIES`) and `name`, in the order of the ids.
        camera: where the picture was taken from.
    """

    image: np.ndarray
    depth: np.ndarray
    segments: np.ndarray
    segments_info: tuple[dict[str, Any], ...]
    camera: Camera


@dataclass(frozen=True)
class _Solid:
    """One object. `base` is the height of its foot, `half` its half extents; for round ones half[0] is the radius."""

    kind: str
    x: float
    y: float
    base: float
    half: tuple[float, float, float]
    yaw: float

    @property
    def reach(self) -> float:
        """Radius of the footprint's circumscribed circle, metres."""
        return math.hypot(self.half[0], self.half[1]) if self.kind == "box" else self.half[0]

    @property
    def top(self) -> float:
        return self.base + 2 * self.half[2]


@dataclass(frozen=True)
class _Room:
    """Everything a picture needs, free of any picture size. `low`, `high`: (3,) corners of the room."""

    camera: Camera
    low: np.ndarray
    high: np.ndarray
    light: np.ndarray
    power: float
    ambient: float
    noise: float
    solids: tuple[_Solid, ...]
    table: np.ndarray


class _Dice:
    """A few hundred uniform numbers drawn at once: python floats are far cheaper than generator calls."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._next: Iterator[float] = iter(rng.random(1200).tolist())

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * next(self._next)

    def pick(self, options: tuple) -> Any:
        return options[int(next(self._next) * len(options))]


def render(seed: int, index: int, size: int | tuple[int, int], difficulty: str = "varied") -> Scene:
    """Renders room `index` of the endless series `seed`.

    Args:
        seed, index: non-negative; the room depends on nothing else.
        size: side of a square picture, or (height, width); sides of at least 8 and at most 4 to 3 wide.
        difficulty: "varied": camera height, angles, focal length, room and texture sizes all vary.
            "plain": fixed camera height, focal length and texture scale, so that size in the picture says distance.

    Raises:
        ValueError: unknown difficulty, or a size that is too small or too wide.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 8 or width > 1.5 * height:
        raise ValueError(f"size {size}: need sides of 8 pixels or more and a width of at most 1.5 heights")
    if difficulty not in ("varied", "plain"):
        raise ValueError(f'difficulty "{difficulty}" is unknown: use "varied" or "plain"')
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, index])))
    room = _furnish(_Dice(rng), plain=difficulty == "plain")
    samples = 2 if max(height, width) <= SMOOTHED_SIDE else 1
    with np.errstate(all="ignore"):  # rays that miss divide by zero; comparisons with nan say "no hit", as wanted
        rays = _rays(room.camera, height, width, samples)
        depth, surface, face = _cast(room, rays)
        colour = _shade(room, rays, depth, surface, face)
    colour = _quincunx(colour) if samples == 2 else colour[:, 0]
    depth, surface = depth[0], surface[0]
    grain = rng.standard_normal((3, height, width), dtype=np.float32)
    grain *= 255 * room.noise
    image = np.clip(colour * 255 + grain, 0, 255).astype(np.uint8).transpose(1, 2, 0)
    segments, info = _segments(room, surface)
    return Scene(np.ascontiguousarray(image), np.ascontiguousarray(depth), segments, info, room.camera)


# ---------------------------------------------------------------- the room's contents


def _furnish(dice: _Dice, plain: bool) -> _Room:
    """Chooses camera, room, light, solids and textures; the bounds keep every depth within (0.3, 9.9) m."""
    camera = _camera(dice, plain)
    low = np.array([-dice.uniform(1.4, 3.8), -dice.uniform(0.7, 1.5), 0.0])
    high = np.array([dice.uniform(1.4, 3.8), dice.uniform(3.2, 8.0), dice.uniform(2.4, 3.2)])
    light = np.array([dice.uniform(-1.2, 1.2), dice.uniform(0.2, 0.7) * high[1], high[2] - dice.uniform(0.15, 0.5)])
    solids = _solids(dice, camera, low, high, float(light[2]) - 0.25, plain)
    rows = [_surface_row(dice, (0.0, 0.0, 0.0), 0.0, 0.0, 0.0, name, plain) for name in STUFF]
    rows += [_solid_row(dice, solid, plain) for solid in solids]
    table = np.array(rows, np.float32).T.copy()
    power = dice.uniform(1.1, 1.5)
    ambient, noise = dice.uniform(0.3, 0.5), 0.01 if plain else dice.uniform(0.004, 0.025)
    return _Room(camera, low, high, light, power, ambient, noise, solids, table)


def _camera(dice: _Dice, plain: bool) -> Camera:
    yaw = dice.uniform(-0.12, 0.12) if plain else dice.uniform(-0.65, 0.65)
    pitch = dice.uniform(-0.24, -0.18) if plain else dice.uniform(-0.4, 0.02)
    height = 1.5 if plain else dice.uniform(1.1, 1.95)
    focal = 0.95 if plain else dice.uniform(0.8, 1.15)
    forward = np.array([math.sin(yaw) * math.cos(pitch), math.cos(yaw) * math.cos(pitch), math.sin(pitch)])
    right = np.array([math.cos(yaw), -math.sin(yaw), 0.0])
    return Camera(np.array([0.0, 0.0, height]), np.stack([right, np.cross(right, forward), forward]), focal)


def _solids(
    dice: _Dice, camera: Camera, low: np.ndarray, high: np.ndarray, ceiling: float, plain: bool
) -> tuple[_Solid, ...]:
    """Three to eight solids in view, none overlapping: on the floor, or smaller ones on top of boxes and cylinders."""
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


def _solid(dice: _Dice, x: float, y: float, base: float, reach: float, ceiling: float, plain: bool) -> _Solid:
    """One solid whose footprint fits a circle of radius `reach`, so that what is stacked never overhangs."""
    kind = dice.pick(("box", "box", "box", "sphere", "sphere", "cylinder", "cylinder", "cone", "cone"))
    radius = reach * (dice.uniform(0.75, 0.95) if plain or base else dice.uniform(0.35, 1.0))
    height = radius * (dice.uniform(1.2, 1.8) if plain else dice.uniform(0.8, 3.2))
    height = min(height, (ceiling - base) * 0.95)
    if kind == "sphere":
        radius = min(radius, 0.4, height)
        return _Solid(kind, x, y, base, (radius, radius, radius), dice.uniform(0, math.pi))
    if kind == "box":
        turn = dice.uniform(0.5, 1.0)  # angle of the footprint's diagonal: how oblong it is
        half = (radius * math.cos(turn), radius * math.sin(turn), height / 2)
        return _Solid(kind, x, y, base, half, dice.uniform(0, math.pi))
    radius *= 0.75
    return _Solid(kind, x, y, base, (radius, radius, height / 2), dice.uniform(0, math.pi))


# ---------------------------------------------------------------- textures

# Rows of the surface table, gathered for all pixels at once: shading then has no loop over objects.
_CENTRE, _TURN, _BEND, _CELL, _PHASE = slice(0, 3), slice(3, 5), slice(5, 7), slice(7, 10), slice(10, 13)
_DARK, _SPAN, _WEIGHTS, _GLOSS = slice(13, 16), slice(16, 19), slice(19, 23), 23
# name -> cells a texture unit along x, y, z and the weights of (parity, joint, cell shade, noise)
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


def _solid_row(dice: _Dice, solid: _Solid, plain: bool) -> list[float]:
    """Surface parameters of one solid; a sphere's and a box's local origin is the centre, a round one's the foot."""
    lift = 0.0 if solid.kind in ("cylinder", "cone") else solid.half[2]
    bend = {"sphere": (1.0, 0.0), "cone": (-(_slope(solid) ** 2), _slope(solid) * solid.half[0])}
    across, offset = bend.get(solid.kind, (0.0, 0.0))
    return _surface_row(dice, (solid.x, solid.y, solid.base + lift), solid.yaw, across, offset, solid.kind, plain)


def _surface_row(
    dice: _Dice, centre: tuple, yaw: float, across: float, offset: float, name: str, plain: bool
) -> list[float]:
    """One row of the table. A curved surface's normal at local q is along (q_x, q_y, across * q_z + offset)."""
    default = ("checker", "rings", "stripes", "tiles", "bricks", "planks", "plaster")
    density, weights = _PATTERNS[dice.pick(_CHOICES.get(name, default))]
    low, high = _SCALES.get(name, (0.14, 0.3))
    scale = (low + high) / 2 if plain else dice.uniform(0.8 * low, 1.3 * high)
    cell = [d / scale for d in density]
    phase = [dice.uniform(0.1, 0.9) if d else 0.5 for d in density]  # unused axes stay clear of the joints
    dark, bright = _colours(dice, name)
    span = [b - d for b, d in zip(bright, dark, strict=True)]
    gloss = 0.0 if name in STUFF else dice.pick((0.0, 0.2, 0.5))
    turn = (math.cos(yaw), math.sin(yaw))
    return [*centre, *turn, across, offset, *cell, *phase, *dark, *span, *weights, gloss]


def _colours(dice: _Dice, name: str) -> tuple[list[float], list[float]]:
    """Linear-light albedos of a texture's two ends."""
    hue, strength = dice.uniform(0, 1), {"floor": 0.45, "wall": 0.28, "ceiling": 0.08}.get(name, 0.85)
    hue = dice.uniform(0.02, 0.16) if name == "floor" else hue
    value = {"floor": 0.75, "wall": 0.9, "ceiling": 0.97}.get(name, dice.uniform(0.7, 1.0))
    contrast = {"floor": 0.5, "wall": 0.7, "ceiling": 0.88}.get(name, dice.uniform(0.3, 0.65))
    first = _rgb(hue, strength * dice.uniform(0.6, 1.0), value)
    other = hue if name in STUFF else hue + dice.pick((0.0, 0.08, 0.5))
    second = _rgb(other, strength * dice.uniform(0.4, 1.0), value * contrast)
    return (first, second) if dice.uniform(0, 1) < 0.5 else (second, first)


def _rgb(hue: float, saturation: float, value: float) -> list[float]:
    """Linear-light RGB (display value squared) of a hue in turns."""
    ramps = [min(1.0, max(0.0, abs(((hue + shift) % 1.0) * 6 - 3) - 1)) for shift in (0.0, 2 / 3, 1 / 3)]
    return [(value * (1 - saturation * (1 - ramp))) ** 2 for ramp in ramps]


@lru_cache(maxsize=1)
def _noise_tables() -> tuple[np.ndarray, np.ndarray]:
    """A (65536,) smooth tileable 256x256 noise and a (1024,) white one, float32 in [0, 1]; the same for all rooms."""
    rng = np.random.Generator(np.random.PCG64(7))
    rate = np.hypot(np.fft.fftfreq(256)[:, None], np.fft.rfftfreq(256)[None]) * 256
    spectrum = np.fft.rfft2(rng.standard_normal((256, 256))) / np.maximum(rate, 2.0) ** 1.3
    smooth = np.fft.irfft2(spectrum)
    smooth = np.clip(0.5 + 0.22 * smooth / smooth.std(), 0, 1)
    return smooth.astype(np.float32).reshape(-1), rng.random(1024, dtype=np.float32)


# ---------------------------------------------------------------- rays and hits


def _rays(camera: Camera, height: int, width: int, samples: int) -> np.ndarray:
    """(3, S, H, W) float32 directions with unit component along the optical axis: hit parameter = z-depth."""
    focal = camera.focal * height
    shift = np.array([0.5, 1.0])[:samples, None]
    u = (np.arange(width) + shift - width / 2)[:, None, :] / focal
    v = (height / 2 - shift - np.arange(height))[:, :, None] / focal
    right, up, forward = camera.basis[:, :, None, None, None]
    return (forward + up * v).astype(np.float32) + (right * u).astype(np.float32)


def _quincunx(colour: np.ndarray) -> np.ndarray:
    """(3, 2, H, W) -> (3, H, W): half the centre, an eighth of each corner. Cheap, symmetric anti-aliasing."""
    corner = np.concatenate([colour[:, 1, :1], colour[:, 1]], axis=1)
    corner = corner[:, 1:] + corner[:, :-1]
    corner = np.concatenate([corner[:, :, :1], corner], axis=2)
    return 0.5 * colour[:, 0] + 0.125 * (corner[:, :, 1:] + corner[:, :, :-1])


def _cast(room: _Room, rays: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Nearest hits: depth (S, H, W) float32, surface (S, H, W) intp row of the table, face (S, H, W) int8."""
    inverse = 1 / rays
    low, high = ((corner - room.camera.origin).astype(np.float32)[:, None, None, None] for corner in (room.low, room.high))
    exits = np.maximum(low * inverse, high * inverse)
    depth = exits.min(axis=0)
    face = np.where(exits[2] <= depth, np.int8(2), (exits[1] <= depth).view(np.int8))
    surface = np.where(face == 2, np.where(rays[2] < 0, 0, 2), 1)
    corners = _corners(room.solids)
    for index, window in enumerate(_windows(corners, room.camera, rays.shape[2:])):
        hits, codes = _hit(room.solids[index], room.camera.origin, rays[(slice(None), *window)])
        closer = hits < depth[window]
        np.copyto(depth[window], hits, where=closer)
        np.copyto(surface[window], index + len(STUFF), where=closer)
        np.copyto(face[window], codes, where=closer)
    return depth, surface, face


def _corners(solids: tuple[_Solid, ...]) -> np.ndarray:
    """(solids, 8, 3) corners of the solids' upright bounding boxes."""
    numbers = np.array([(s.x, s.y, s.base + s.half[2], *s.half, math.cos(s.yaw), math.sin(s.yaw)) for s in solids])
    offset = _SIGNS * numbers[:, None, 3:6]
    cos, sin = numbers[:, 6:7], numbers[:, 7:8]
    turned = (cos * offset[..., 0] - sin * offset[..., 1], sin * offset[..., 0] + cos * offset[..., 1], offset[..., 2])
    return np.stack(turned, axis=-1) + numbers[:, None, :3]


_SIGNS = np.array([[x, y, z] for x in (-1.0, 1.0) for y in (-1.0, 1.0) for z in (-1.0, 1.0)])


def _windows(
    points: np.ndarray, camera: Camera, size: tuple[int, int]
) -> list[tuple[slice, slice, slice]]:
    """For each row of (solids, n, 3) points, the (all samples, rows, columns) that hold their convex hull."""
    height, width = size
    right, up, forward = np.moveaxis((points - camera.origin) @ camera.basis.T, -1, 0)
    scale = camera.focal * height / forward
    columns, rows = width / 2 + right * scale, height / 2 - up * scale
    bounds = np.stack([rows.min(1) - 1, rows.max(1) + 1, columns.min(1) - 1, columns.max(1) + 1], axis=1)
    bounds[forward.min(1) < 0.05] = (0, height, 0, width)  # reaches behind the camera: look everywhere
    bounds = np.clip(np.ceil(bounds), 0, (height, height, width, width)).astype(int).tolist()
    return [(slice(None), slice(top, bottom), slice(left, end)) for top, bottom, left, end in bounds]


def _hit(solid: _Solid, origin: np.ndarray, rays: np.ndarray) -> tuple[np.ndarray, np.ndarray | int]:
    """Hit parameters (inf where missed) and face codes of (3, S, h, w) rays from a point outside and not below."""
    x, y, z = (origin - (solid.x, solid.y, solid.base)).tolist()
    if solid.kind == "box":
        return _hit_box((x, y, z - solid.half[2]), rays, solid.half, solid.yaw)
    if solid.kind == "sphere":
        return _hit_sphere((x, y, z - solid.half[2]), rays, solid.half[0]), _CURVED
    return _hit_round((x, y, z), rays, solid.half[0], 2 * solid.half[2], _slope(solid))


def _slope(solid: _Solid) -> float:
    """How fast a round solid's radius falls with height: 0 for a cylinder."""
    return solid.half[0] / (2 * solid.half[2]) if solid.kind == "cone" else 0.0


def _hit_box(origin: tuple, rays: np.ndarray, half: tuple, yaw: float) -> tuple[np.ndarray, np.ndarray]:
    cos, sin = math.cos(yaw), math.sin(yaw)
    x, y, z = origin
    start = np.array([cos * x + sin * y, cos * y - sin * x, z], np.float32)[:, None, None, None]
    inverse = np.empty_like(rays)
    inverse[0] = cos * rays[0] + sin * rays[1]
    inverse[1] = cos * rays[1] - sin * rays[0]
    inverse[2] = rays[2]
    np.reciprocal(inverse, out=inverse)
    middle = start * inverse
    reach = np.abs(inverse) * np.array(half, np.float32)[:, None, None, None]
    enter = -middle - reach
    first = enter.max(axis=0)
    last = (reach - middle).min(axis=0)
    codes = np.where(enter[2] >= first, np.int8(2), (enter[1] >= first).view(np.int8))
    return np.where((first < last) & (first > 0), first, np.float32(np.inf)), codes


def _hit_sphere(origin: tuple, rays: np.ndarray, radius: float) -> np.ndarray:
    x, y, z = origin
    square = (rays * rays).sum(axis=0)
    along = x * rays[0] + y * rays[1] + z * rays[2]
    root = along * along - square * (x * x + y * y + z * z - radius * radius)
    hits = (-along - np.sqrt(root)) / square
    return np.where(hits > 0, hits, np.float32(np.inf))


def _hit_round(
    origin: tuple, rays: np.ndarray, radius: float, height: float, slope: float
) -> tuple[np.ndarray, np.ndarray | int]:
    """Cylinder (slope 0, with its top) or cone (both roots: the nearer may lie on the mirror cone above the tip)."""
    x, y, z = origin
    dx, dy, dz = rays
    wide = radius - slope * z
    square = dx * dx + dy * dy - (slope * slope) * (dz * dz)
    along = x * dx + y * dy + (slope * wide) * dz
    root = np.sqrt(along * along - square * (x * x + y * y - wide * wide))
    nearer = (-along - root) / square
    inside = (np.abs(z - height / 2 + nearer * dz) <= height / 2) & (nearer > 0)
    hits = np.where(inside, nearer, np.float32(np.inf))
    if slope:
        other = (root - along) / square
        inside = (np.abs(z - height / 2 + other * dz) <= height / 2) & (other > 0) & (other < hits)
        np.copyto(hits, other, where=inside)
        return hits, _CURVED
    cap = (height - z) / dz
    px, py = x + cap * dx, y + cap * dy
    inside = (px * px + py * py < radius * radius) & (cap > 0) & (cap < hits)
    np.copyto(hits, cap, where=inside)
    return hits, np.where(inside, np.int8(2), np.int8(_CURVED))


# ---------------------------------------------------------------- shading


def _shade(room: _Room, rays: np.ndarray, depth: np.ndarray, surface: np.ndarray, face: np.ndarray) -> np.ndarray:
    """(3, S, H, W) float32 display colours, about [0, 1]. One pass for all surfaces: no loop over objects."""
    rows = room.table.take(surface.reshape(-1), axis=1)
    points = (rays * depth).reshape(3, -1) + room.camera.origin.astype(np.float32)[:, None]
    local = _to_local(points - rows[_CENTRE], rows[_TURN])
    view = _to_local(rays.reshape(3, -1), rows[_TURN])
    flat = face.reshape(-1) == np.arange(3, dtype=np.int8)[:, None]
    normal, facing = _normals(local, view, flat, face.reshape(-1) == _CURVED, rows[_BEND])
    to_light = room.light.astype(np.float32)[:, None] - points
    lit = _unshadowed(room, to_light.reshape(rays.shape)).reshape(-1)
    towards = _to_local(to_light, rows[_TURN])
    albedo = _texture(local, flat, rows, facing, room.camera.focal * rays.shape[2] / depth.reshape(-1))
    range2 = (towards * towards).sum(axis=0)
    unit = towards / np.sqrt(range2)
    cosine = np.maximum((normal * unit).sum(axis=0), 0) * lit
    fall = room.power / (1 + 0.06 * range2)
    light = room.ambient * (0.8 + 0.2 * normal[2]) + fall * cosine
    colour = albedo * light
    half = unit - view / np.sqrt((view * view).sum(axis=0))
    shine = (normal * half).sum(axis=0) ** 2 / (half * half).sum(axis=0)
    colour += rows[_GLOSS] * fall * (cosine > 0) * shine**24
    return np.sqrt(colour).reshape(3, *depth.shape)


def _to_local(vectors: np.ndarray, turn: np.ndarray) -> np.ndarray:
    """Turns (3, N) world vectors about the vertical into each pixel's own object frame."""
    result = np.empty_like(vectors)
    result[0] = turn[0] * vectors[0] + turn[1] * vectors[1]
    result[1] = turn[0] * vectors[1] - turn[1] * vectors[0]
    result[2] = vectors[2]
    return result


def _normals(
    local: np.ndarray, view: np.ndarray, flat: np.ndarray, curved: np.ndarray, bend: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(3, N) unit normals towards the viewer in object frames, and (N,) cosines to the (unnormalised) view ray."""
    normal = flat.astype(np.float32)
    normal[:2] += curved * local[:2]
    normal[2] += curved * (bend[0] * local[2] + bend[1])
    normal /= np.sqrt((normal * normal).sum(axis=0))
    facing = (normal * view).sum(axis=0)
    normal *= -np.sign(facing)
    return normal, np.abs(facing)


def _unshadowed(room: _Room, to_light: np.ndarray) -> np.ndarray:
    """(S, H, W) float32, 1 where the lamp is in sight. Rays run from the lamp, so the solids' own test serves."""
    lit = np.ones(to_light.shape[1:], np.float32)
    rays = -to_light
    corners = _corners(room.solids)
    stretch = room.light[2] / (room.light[2] - corners[..., 2:])
    ends = room.light + (corners - room.light) * stretch  # where the shadow's edges would meet the floor
    points = np.concatenate([corners, ends], axis=1)
    for solid, window in zip(room.solids, _windows(points, room.camera, lit.shape[1:]), strict=True):
        hits, _ = _hit(solid, room.light, rays[(slice(None), *window)])
        lit[window] *= hits > 0.997
    return lit


def _texture(
    local: np.ndarray, flat: np.ndarray, rows: np.ndarray, facing: np.ndarray, per_metre: np.ndarray
) -> np.ndarray:
    """(3, N) linear albedo of solid textures: cells in object coordinates with joints, shades and noise.

    Patterns finer than a sample fade to their mean instead of aliasing; `per_metre` is samples per metre there.
    """
    smooth, white = _noise_tables()
    place = local * rows[_CELL] + rows[_PHASE]
    cell = np.floor(place)
    inner = np.where(flat, np.float32(0), np.abs(place - cell - np.float32(0.5)))
    parity = np.float32([1, 1, 1]) @ cell
    parity -= 2 * np.floor(parity * np.float32(0.5))
    shade = white[(np.float32([7, 57, 131]) @ cell).astype(np.int32) & 1023]
    where = np.float32([[50, -25, -25], [0, 43, -43]]) @ place
    where[0] += 256 * shade
    where = where.astype(np.int32) & 255
    grain = smooth[where[0] * 256 + where[1]]
    joint = inner.max(axis=0) > 0.455
    parts, joints, shades, grains = rows[_WEIGHTS]
    mix = parts * parity + joints * joint + shades * shade + grains * grain
    mean = np.float32(0.5) * (parts + shades + grains)
    sharp = np.clip(per_metre * (facing + np.float32(0.05)) / rows[_CELL].max(axis=0) - np.float32(0.8), 0, 1)
    return rows[_DARK] + rows[_SPAN] * np.clip(mean + (mix - mean) * sharp, 0, 1)


def _segments(room: _Room, surface: np.ndarray) -> tuple[np.ndarray, tuple[dict[str, Any], ...]]:
    """Numbers the visible surfaces 1..K, stuff first, and lists them."""
    names = [*STUFF, *(solid.kind for solid in room.solids)]
    seen = np.bincount(surface.reshape(-1), minlength=len(names)) > 0
    ids = np.cumsum(seen).astype(np.int32)
    kept = [name for name, visible in zip(names, seen.tolist(), strict=True) if visible]
    info = tuple({"id": i, "category_id": CATEGORY_IDS[name], "name": name} for i, name in enumerate(kept, start=1))
    return ids[surface], info
