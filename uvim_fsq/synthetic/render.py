"""A vectorized ray caster for furnished rooms: images with exact depth, surface normals and segments.

The same (seed, index) gives the same room at every image size. Independent of files, data sets and models.

World axes: x right, y forward, z up, in meters; the camera is above the origin. Depth is z-depth (distance along the
optical axis, as in NYU Depth v2), not distance along the ray.

Shapes: H, W image size; S rays per pixel (its center, and its lower right corner if the image is anti-aliased);
N = S * H * W.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from uvim_fsq.synthetic import rooms, still_life
from uvim_fsq.synthetic.rooms import (
    BEND,
    CATEGORIES,
    CATEGORY_IDS,
    CELL,
    CENTER,
    DARK,
    GLOSS,
    PHASE,
    SPAN,
    STUFF,
    THINGS,
    TURN,
    WEIGHTS,
    Camera,
    Dice,
    Room,
    Solid,
    slope_of,
)

__all__ = ["CATEGORIES", "CATEGORY_IDS", "STUFF", "THINGS", "WORLDS", "Camera", "Scene", "render"]

#: World -> the function that draws one of its rooms.
WORLDS: dict[str, Callable[[Dice, bool], Room]] = {"rooms": rooms.furnish, "still_life": still_life.furnish}

Window = tuple[slice, slice, slice]
SMOOTHED_SIDE = 64  # images are anti-aliased up to this longer side
_CURVED = 3  # face code of a curved surface; 0, 1, 2 are flat faces across local x, y, z


@dataclass(frozen=True)
class Scene:
    """One rendered room.

    Attributes:
        image: (H, W, 3) uint8 RGB.
        depth: (H, W) float32 z-depth in meters at the pixel centers, within (0.3, 9.9), without holes.
        normals: (H, W, 3) float32 unit normals of the surfaces at the pixel centers, on the camera's side, in camera
            coordinates: x right, y up, z back, from the scene to the camera (as in OpenGL).
        segments: (H, W) int32 ids 1..K at the pixel centers; every id has at least one pixel.
        segments_info: K dicts with `id`, `category_id` (see `CATEGORIES`) and `name`, ordered by id.
        camera: the camera that took the image.
    """

    image: np.ndarray
    depth: np.ndarray
    normals: np.ndarray
    segments: np.ndarray
    segments_info: tuple[dict[str, Any], ...]
    camera: Camera


def render(
    seed: int, index: int, size: int | tuple[int, int], difficulty: str = "varied", world: str = "rooms"
) -> Scene:
    """Renders room `index` of the infinite series `seed`.

    Args:
        seed, index: non-negative integers; with `difficulty`, they determine the room.
        size: side of a square image, or (height, width); each at least 8, the width at most 1.5 times the height.
        difficulty: "varied": camera height, angles, focal length, room and texture sizes all vary.
            "plain": fixed camera height, focal length and texture scale, so that apparent size reveals distance.
        world: "rooms": up to eight objects of any size; patterns and colors are independent of each other.
            "still_life": two to four large objects; their materials decide pattern and likely colors.

    Raises:
        ValueError: unknown difficulty or world, or an image size that is too small or too wide.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 8 or width > 1.5 * height:
        raise ValueError(f"size {size}: sides must be at least 8 pixels, and the width at most 1.5 times the height")
    if difficulty not in ("varied", "plain"):
        raise ValueError(f'difficulty "{difficulty}" is unknown: use "varied" or "plain"')
    if world not in WORLDS:
        raise ValueError(f'world "{world}" is unknown: use {" or ".join(map(repr, WORLDS))}')
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, index])))
    room = WORLDS[world](Dice(rng), difficulty == "plain")
    samples = 2 if max(height, width) <= SMOOTHED_SIDE else 1
    with np.errstate(all="ignore"):  # rays that miss divide by zero; comparisons with nan then mean "no hit"
        rays = _rays(room.camera, height, width, samples)
        bodies, shadows = _windows(room, (height, width))
        depth, surface, face = _cast(room, rays, bodies)
        hits = _hits(room, rays, depth, surface, face)
        color = _shade(room, rays, depth, hits, shadows)
    normals = _camera_normals(room.camera, hits, depth.shape)
    color = _anti_aliased(color) if samples == 2 else color[:, 0]
    depth, surface = depth[0], surface[0]
    grain = rng.standard_normal((3, height, width), dtype=np.float32)
    grain *= 255 * room.noise
    image = np.clip(color * 255 + grain, 0, 255).astype(np.uint8).transpose(1, 2, 0)
    segments, info = _segments(room, surface)
    return Scene(np.ascontiguousarray(image), np.ascontiguousarray(depth), normals, segments, info, room.camera)


@lru_cache(maxsize=1)
def _noise_tables() -> tuple[np.ndarray, np.ndarray]:
    """(65536,) smooth tileable noise (256 x 256) and (1024,) white noise, float32 in [0, 1]; the same in all rooms."""
    rng = np.random.Generator(np.random.PCG64(7))
    rate = np.hypot(np.fft.fftfreq(256)[:, None], np.fft.rfftfreq(256)[None]) * 256
    spectrum = np.fft.rfft2(rng.standard_normal((256, 256))) / np.maximum(rate, 2.0) ** 1.3
    smooth = np.fft.irfft2(spectrum)
    smooth = np.clip(0.5 + 0.22 * smooth / smooth.std(), 0, 1)
    return smooth.astype(np.float32).reshape(-1), rng.random(1024, dtype=np.float32)


# ---------------------------------------------------------------- rays and hits


def _rays(camera: Camera, height: int, width: int, samples: int) -> np.ndarray:
    """(3, S, H, W) float32 ray directions of unit length along the optical axis, so that hit parameter = z-depth."""
    focal = camera.focal * height
    shift = np.array([0.5, 1.0])[:samples, None]
    u = (np.arange(width) + shift - width / 2)[:, None, :] / focal
    v = (height / 2 - shift - np.arange(height))[:, :, None] / focal
    right, up, forward = camera.basis[:, :, None, None, None]
    return (forward + up * v).astype(np.float32) + (right * u).astype(np.float32)


def _anti_aliased(color: np.ndarray) -> np.ndarray:
    """(3, 2, H, W) -> (3, H, W): half the center sample plus an eighth of each corner sample (quincunx filter)."""
    corner = np.concatenate([color[:, 1, :1], color[:, 1]], axis=1)
    corner = corner[:, 1:] + corner[:, :-1]
    corner = np.concatenate([corner[:, :, :1], corner], axis=2)
    return 0.5 * color[:, 0] + 0.125 * (corner[:, :, 1:] + corner[:, :, :-1])


def _cast(room: Room, rays: np.ndarray, windows: list[Window]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Nearest hits: depth (S, H, W) float32, surface (S, H, W) intp column of the table, face (S, H, W) int8."""
    inverse = 1 / rays
    low, high = ((corner - room.camera.origin).astype(np.float32) for corner in (room.low, room.high))
    exits = np.maximum(low[:, None, None, None] * inverse, high[:, None, None, None] * inverse)
    depth = exits.min(axis=0)
    face = np.where(exits[2] <= depth, np.int8(2), (exits[1] <= depth).view(np.int8))
    surface = np.where(face == 2, np.where(rays[2] < 0, 0, 2), 1)
    planar = rays[0] * rays[0] + rays[1] * rays[1]
    for index, window in enumerate(windows):
        hits, codes = _hit(room.solids[index], room.camera.origin, rays[(slice(None), *window)], planar[window])
        closer = hits < depth[window]
        np.copyto(depth[window], hits, where=closer)
        np.copyto(surface[window], index + len(STUFF), where=closer)
        np.copyto(face[window], codes, where=closer)
    return depth, surface, face


def _corners(solids: tuple[Solid, ...]) -> np.ndarray:
    """(solids, 8, 3) corners of the solids' bounding boxes, which are rotated about the vertical only."""
    rows = [(s.x, s.y, s.base + s.half[2], *s.half, math.cos(s.yaw), math.sin(s.yaw)) for s in solids]
    numbers = np.array(rows).reshape(-1, 8)  # a few rooms have no solids
    offset = _SIGNS * numbers[:, None, 3:6]
    cos, sin = numbers[:, 6:7], numbers[:, 7:8]
    turned = (cos * offset[..., 0] - sin * offset[..., 1], sin * offset[..., 0] + cos * offset[..., 1], offset[..., 2])
    return np.stack(turned, axis=-1) + numbers[:, None, :3]


_SIGNS = np.array([[x, y, z] for x in (-1.0, 1.0) for y in (-1.0, 1.0) for z in (-1.0, 1.0)])


def _windows(room: Room, size: tuple[int, int]) -> tuple[list[Window], list[Window]]:
    """Image windows that contain each solid, and each solid with its shadow: (all samples, rows, columns)."""
    corners = _corners(room.solids)
    stretch = room.light[2] / (room.light[2] - corners[..., 2:])
    ends = room.light + (corners - room.light) * stretch  # the corners' shadows on the floor
    points = np.concatenate([corners, ends], axis=1) - room.camera.origin
    right, up, forward = (points @ room.camera.basis.T).transpose(2, 0, 1)
    height, width = size
    scale = room.camera.focal * height / forward
    columns, rows = width / 2 + right * scale, height / 2 - up * scale
    behind = forward.min(axis=1) < 0.05  # the shadow reaches behind the camera: use the whole image
    bodies = _bounds(rows[:, :8], columns[:, :8], size)
    shadows = _bounds(rows, columns, size)
    everywhere = (slice(None), slice(0, height), slice(0, width))
    return bodies, [everywhere if b else window for b, window in zip(behind.tolist(), shadows, strict=True)]


def _bounds(rows: np.ndarray, columns: np.ndarray, size: tuple[int, int]) -> list[Window]:
    """Windows around (solids, n) image coordinates, one pixel larger because of the corner samples."""
    edges = np.array([rows.min(1) - 1, rows.max(1) + 2, columns.min(1) - 1, columns.max(1) + 2])
    limits = np.array(size).repeat(2)[:, None]
    edges = np.minimum(np.maximum(edges, 0), limits).astype(int).T.tolist()
    return [(slice(None), slice(top, bottom), slice(left, end)) for top, bottom, left, end in edges]


def _hit(solid: Solid, origin: np.ndarray, rays: np.ndarray, planar: np.ndarray) -> tuple[np.ndarray, np.ndarray | int]:
    """Hit parameters (inf for a miss) and face codes of (3, S, h, w) rays.

    Args:
        origin: (3,) start of the rays, outside the solid and not below it.
        planar: (S, h, w) squared horizontal length of the rays.
    """
    x, y, z = (origin - (solid.x, solid.y, solid.base)).tolist()
    if solid.kind == "box":
        return _hit_box((x, y, z - solid.half[2]), rays, solid.half, solid.yaw)
    if solid.kind == "sphere":
        return _hit_sphere((x, y, z - solid.half[2]), rays, planar, solid.half[0]), _CURVED
    return _hit_round((x, y, z), rays, planar, solid.half[0], 2 * solid.half[2], slope_of(solid))


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


def _hit_sphere(origin: tuple, rays: np.ndarray, planar: np.ndarray, radius: float) -> np.ndarray:
    x, y, z = origin
    square = planar + rays[2] * rays[2]
    along = x * rays[0] + y * rays[1] + z * rays[2]
    root = along * along - square * (x * x + y * y + z * z - radius * radius)
    hits = (-along - np.sqrt(root)) / square
    return np.where(hits > 0, hits, np.float32(np.inf))


def _hit_round(
    origin: tuple, rays: np.ndarray, planar: np.ndarray, radius: float, height: float, slope: float
) -> tuple[np.ndarray, np.ndarray | int]:
    """Hits of a cylinder (slope 0, with its top face) or a cone.

    For a cone both roots are tried, since the nearer one may lie on the mirrored cone above the tip.
    """
    x, y, z = origin
    dx, dy, dz = rays
    wide = radius - slope * z
    square, along = planar, x * dx + y * dy
    if slope:
        square, along = planar - (slope * slope) * (dz * dz), along + (slope * wide) * dz
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


@dataclass(frozen=True)
class _Hits:
    """What the rays hit.

    Attributes:
        rows: (24, N) float32 surface parameters, see `Room.table`.
        points: (3, N) float32 world coordinates.
        local, view: (3, N) float32 points and ray directions in the frame of the object that is hit.
        flat: (3, N) bool, whether the face is flat, across local x, y, z.
        normal: (3, N) float32 unit normals facing the camera, in object frames.
        facing: (N,) float32 absolute dot products of normal and ray.
    """

    rows: np.ndarray
    points: np.ndarray
    local: np.ndarray
    view: np.ndarray
    flat: np.ndarray
    normal: np.ndarray
    facing: np.ndarray


def _hits(room: Room, rays: np.ndarray, depth: np.ndarray, surface: np.ndarray, face: np.ndarray) -> _Hits:
    rows = room.table.take(surface.reshape(-1), axis=1)
    points = (rays * depth).reshape(3, -1) + room.camera.origin.astype(np.float32)[:, None]
    local = _to_local(points - rows[CENTER], rows[TURN])
    view = _to_local(rays.reshape(3, -1), rows[TURN])
    flat = face.reshape(-1) == np.arange(3, dtype=np.int8)[:, None]
    normal, facing = _normals(local, view, flat, face.reshape(-1) == _CURVED, rows[BEND])
    return _Hits(rows, points, local, view, flat, normal, facing)


def _camera_normals(camera: Camera, hits: _Hits, shape: tuple[int, ...]) -> np.ndarray:
    """(H, W, 3) normals of the samples at the pixel centers, see `Scene.normals`; `shape` is (S, H, W)."""
    count = shape[1] * shape[2]  # the centers are the first of the S samples
    cos, sin = hits.rows[TURN, :count]
    world = _to_local(hits.normal[:, :count], (cos, -sin))
    axes = camera.basis * np.array([[1.0], [1.0], [-1.0]])  # right, up, back
    return np.ascontiguousarray((axes.astype(np.float32) @ world).T).reshape(*shape[1:], 3)


def _shade(room: Room, rays: np.ndarray, depth: np.ndarray, hits: _Hits, shadows: list[Window]) -> np.ndarray:
    """(3, S, H, W) float32 display colors, roughly in [0, 1], for all surfaces at once."""
    rows, normal, view = hits.rows, hits.normal, hits.view
    to_light = room.light.astype(np.float32)[:, None] - hits.points
    lit = _unshadowed(room, to_light.reshape(rays.shape), shadows).reshape(-1)
    towards = _to_local(to_light, rows[TURN])
    albedo = _texture(hits, room.camera.focal * rays.shape[2] / depth.reshape(-1))
    range2 = (towards * towards).sum(axis=0)
    unit = towards / np.sqrt(range2)
    cosine = np.maximum((normal * unit).sum(axis=0), 0) * lit
    fall = room.power / (1 + 0.06 * range2)
    light = room.ambient * (0.8 + 0.2 * normal[2]) + fall * cosine
    color = albedo * light
    half = unit - view / np.sqrt((view * view).sum(axis=0))
    shine = (normal * half).sum(axis=0) ** 2 / (half * half).sum(axis=0)
    color += rows[GLOSS] * fall * (cosine > 0) * shine**24
    return np.sqrt(color).reshape(3, *depth.shape)


def _to_local(vectors: np.ndarray, turn: np.ndarray | tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Rotates (3, N) world vectors about the vertical into the frame of each pixel's object.

    `turn`: (N,) cosines and sines of the objects' angles; with the sines negated, from there into the world.
    """
    result = np.empty_like(vectors)
    result[0] = turn[0] * vectors[0] + turn[1] * vectors[1]
    result[1] = turn[0] * vectors[1] - turn[1] * vectors[0]
    result[2] = vectors[2]
    return result


def _normals(
    local: np.ndarray, view: np.ndarray, flat: np.ndarray, curved: np.ndarray, bend: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(3, N) unit normals facing the viewer, in object frames, and (N,) absolute dot products with the view ray."""
    normal = flat.astype(np.float32)
    normal[:2] += curved * local[:2]
    normal[2] += curved * (bend[0] * local[2] + bend[1])
    normal /= np.sqrt((normal * normal).sum(axis=0))
    facing = (normal * view).sum(axis=0)
    normal *= -np.sign(facing)
    return normal, np.abs(facing)


def _unshadowed(room: Room, to_light: np.ndarray, windows: list[Window]) -> np.ndarray:
    """(S, H, W) float32, 1 where the lamp is visible, else 0. Rays start at the lamp, so that `_hit` applies."""
    lit = np.ones(to_light.shape[1:], np.float32)
    rays = -to_light
    planar = rays[0] * rays[0] + rays[1] * rays[1]
    for solid, window in zip(room.solids, windows, strict=True):
        hits, _ = _hit(solid, room.light, rays[(slice(None), *window)], planar[window])
        lit[window] *= hits > 0.997
    return lit


def _texture(hits: _Hits, density: np.ndarray) -> np.ndarray:
    """(3, N) linear albedo of solid textures: cells in object coordinates with joints, shades and noise.

    Patterns finer than a sample fade to their mean instead of aliasing. `density`: (N,) samples per meter.
    """
    smooth, white = _noise_tables()
    rows = hits.rows
    place = hits.local * rows[CELL] + rows[PHASE]
    cell = np.floor(place)
    inner = np.where(hits.flat, np.float32(0), np.abs(place - cell - np.float32(0.5)))
    parity = np.array([1, 1, 1], np.float32) @ cell
    parity -= 2 * np.floor(parity * np.float32(0.5))
    shade = white[(np.array([7, 57, 131], np.float32) @ cell).astype(np.int32) & 1023]
    where = np.array([[50, -25, -25], [0, 43, -43]], np.float32) @ place
    where[0] += 256 * shade
    where = where.astype(np.int32) & 255
    grain = smooth[where[0] * 256 + where[1]]
    joint = inner.max(axis=0) > 0.455
    parts, joints, shades, grains = rows[WEIGHTS]
    mix = parts * parity + joints * joint + shades * shade + grains * grain
    mean = np.float32(0.5) * (parts + shades + grains)
    sharp = np.clip(density * (hits.facing + np.float32(0.05)) / rows[CELL].max(axis=0) - np.float32(0.8), 0, 1)
    return rows[DARK] + rows[SPAN] * np.clip(mean + (mix - mean) * sharp, 0, 1)


def _segments(room: Room, surface: np.ndarray) -> tuple[np.ndarray, tuple[dict[str, Any], ...]]:
    """Numbers the visible surfaces 1..K, stuff first: (H, W) int32 ids and the K dicts of `Scene.segments_info`."""
    names = [*STUFF, *(solid.kind for solid in room.solids)]
    seen = np.bincount(surface.reshape(-1), minlength=len(names)) > 0
    ids = np.cumsum(seen).astype(np.int32)
    kept = [name for name, visible in zip(names, seen.tolist(), strict=True) if visible]
    info = tuple({"id": i, "category_id": CATEGORY_IDS[name], "name": name} for i, name in enumerate(kept, start=1))
    return ids[surface], info
