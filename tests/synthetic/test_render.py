"""Synthetic scenes are exact and reproducible."""

from __future__ import annotations

import numpy as np
import pytest

from uvim_fsq.synthetic.render import CATEGORIES, WORLDS, Scene, render

SIZE, SEED = 32, 5

DIFFICULTIES = ("plain", "varied")


def points_of(scene: Scene) -> np.ndarray:
    """(H, W, 3) world coordinates of the pixel centers, from depth and camera alone."""
    height, width = scene.depth.shape
    rows, columns = np.mgrid[:height, :width] + 0.5
    focal = scene.camera.focal * height
    rays = np.stack([(columns - width / 2) / focal, (height / 2 - rows) / focal, np.ones_like(rows)], axis=-1)
    return (rays * scene.depth[..., None]) @ scene.camera.basis + scene.camera.origin


def mask_of(scene: Scene, name: str) -> np.ndarray:
    ids = [info["id"] for info in scene.segments_info if info["name"] == name]
    return np.isin(scene.segments, ids)


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_same_seed_and_index_give_the_same_scene(difficulty):
    first, again, other = (render(SEED, i, SIZE, difficulty) for i in (3, 3, 4))
    for name in ("image", "depth", "segments"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
    assert first.segments_info == again.segments_info
    assert np.abs(first.depth - other.depth).mean() > 0.05
    assert np.abs(first.depth - render(SEED + 1, 3, SIZE, difficulty).depth).mean() > 0.05


@pytest.mark.slow
@pytest.mark.parametrize("difficulty", DIFFICULTIES)
@pytest.mark.parametrize("size", [32, 96, (48, 64)])
@pytest.mark.parametrize("world", list(WORLDS))
def test_fields_have_the_promised_types_and_ranges(difficulty, size, world):
    shape = (size, size) if isinstance(size, int) else size
    categories = {c["id"]: c["name"] for c in CATEGORIES}
    for index in range(40):
        scene = render(SEED, index, size, difficulty, world)
        assert scene.image.shape == (*shape, 3) and scene.image.dtype == np.uint8
        assert scene.depth.shape == shape and scene.depth.dtype == np.float32
        assert scene.segments.shape == shape and scene.segments.dtype == np.int32
        assert scene.depth.min() > 0.3 and scene.depth.max() < 9.9
        ids = [info["id"] for info in scene.segments_info]
        assert ids == list(range(1, len(ids) + 1)) == np.unique(scene.segments).tolist()
        assert all(categories[info["category_id"]] == info["name"] for info in scene.segments_info)
        assert scene.image.std() > 8


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_floor_wall_and_ceiling_points_lie_on_their_planes(difficulty):
    for index in range(20):
        scene = render(SEED, index, SIZE, difficulty)
        points = points_of(scene)
        floor, ceiling, wall = (points[mask_of(scene, name)] for name in ("floor", "ceiling", "wall"))
        assert np.abs(floor[:, 2]).max() < 1e-4
        assert len(ceiling) == 0 or np.ptp(ceiling[:, 2]) < 1e-4
        sides = [points[..., axis][mask_of(scene, "wall")] for axis in (0, 1)]
        bounds = [(points[..., axis].min(), points[..., axis].max()) for axis in (0, 1)]
        on_side = [np.isclose(s[:, None], b, atol=1e-3).any(1) for s, b in zip(sides, bounds, strict=True)]
        assert (on_side[0] | on_side[1]).all() and wall[:, 2].min() > -1e-4


def test_things_stand_above_the_floor_and_inside_the_room():
    for index in range(20):
        scene = render(SEED, index, 64)
        points, things = points_of(scene), ~np.isin(scene.segments, [0])
        for name in ("floor", "wall", "ceiling"):
            things &= ~mask_of(scene, name)
        assert points[things][:, 2].min() > -1e-3
        wall = points[mask_of(scene, "wall")]
        assert points[things][:, 1].max() < wall[:, 1].max() + 1e-3


def test_sphere_points_are_equally_far_from_a_center():
    tested = 0
    for index in range(12):
        scene = render(SEED, index, 128)
        points = points_of(scene)
        for info in scene.segments_info:
            surface = points[scene.segments == info["id"]]
            if info["name"] != "sphere" or len(surface) < 100:
                continue
            # |p|^2 = 2 p.c + (r^2 - |c|^2) is linear in the unknowns
            design = np.concatenate([2 * surface, np.ones((len(surface), 1))], axis=1)
            solution = np.linalg.lstsq(design, (surface**2).sum(axis=1), rcond=None)[0]
            radius = np.linalg.norm(surface - solution[:3], axis=1)
            assert np.ptp(radius) < 2e-3 and 0.02 < radius.mean() < 0.7
            tested += 1
    assert tested >= 3


def shifted(array: np.ndarray) -> list[np.ndarray]:
    """The four neighbors of the inner pixels: right, left, above, below."""
    return [array[1:-1, 2:], array[1:-1, :-2], array[:-2, 1:-1], array[2:, 1:-1]]


def degrees_between(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    return np.degrees(np.arctan2(np.linalg.norm(np.cross(one, two), axis=-1), (one * two).sum(-1)))


@pytest.mark.parametrize("world", list(WORLDS))
def test_normals_are_those_of_the_surface_that_the_depth_map_shows(world):
    """Central differences are exact on planes, where a pixel's neighbors have its normal, and close on curved faces."""
    curved = 0
    for index in range(4):
        scene = render(SEED, index, (96, 128), "varied", world)
        # world axes -> right, up, back
        points = (points_of(scene) - scene.camera.origin) @ scene.camera.basis.T * [1, 1, -1]
        right, left, above, below = shifted(points)
        expected = np.cross(right - left, above - below)
        normals = scene.normals.astype(np.float64)[1:-1, 1:-1]
        same = np.logical_and.reduce([ids == scene.segments[1:-1, 1:-1] for ids in shifted(scene.segments)])
        bend = np.max([degrees_between(normals, other) for other in shifted(scene.normals)], axis=0)
        error = degrees_between(expected, normals)
        assert error[same & (bend < 1e-3)].max() < 0.01 and (same & (bend < 1e-3)).mean() > 0.5
        bent = same & (bend > 1e-3) & (bend < 5)
        assert error[bent].max(initial=0) < 1
        curved += int(bent.sum())
    assert curved > 500


def test_normals_have_unit_length_and_face_the_camera():
    scene = render(SEED, 1, SIZE)
    assert scene.normals.shape == (SIZE, SIZE, 3) and scene.normals.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(scene.normals, axis=-1), 1, atol=1e-6)
    towards = (scene.camera.origin - points_of(scene)) @ scene.camera.basis.T * [1, 1, -1]
    assert ((scene.normals * towards).sum(-1) > 0).all()


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_the_scene_does_not_depend_on_the_picture_size(difficulty):
    for index in range(8):
        small, large = render(SEED, index, 32, difficulty), render(SEED, index, 96, difficulty)
        # pixel centers of the small picture are pixel centers of the three times larger one
        np.testing.assert_allclose(small.depth, large.depth[1::3, 1::3], atol=2e-3)
        names = [np.array([""] + [i["name"] for i in s.segments_info])[s.segments] for s in (small, large)]
        assert (names[0] == names[1][1::3, 1::3]).mean() > 0.995
        coarse = large.image.reshape(32, 3, 32, 3, 3).mean(axis=(1, 3))
        assert np.abs(coarse - small.image).mean() < 12


def test_plain_rooms_share_camera_height_and_focal_length():
    cameras = [render(SEED, i, 16, "plain").camera for i in range(10)]
    assert {(c.origin[2], c.focal) for c in cameras} == {(1.5, 0.95)}
    varied = [render(SEED, i, 16).camera for i in range(10)]
    assert len({c.origin[2] for c in varied}) == len({c.focal for c in varied}) == 10


@pytest.mark.parametrize(
    ("size", "difficulty", "world", "message"),
    [
        (4, "plain", "rooms", "size"),
        ((32, 64), "plain", "rooms", "size"),
        (32, "hard", "rooms", "difficulty"),
        (32, "plain", "garden", "world"),
    ],
)
def test_impossible_requests_are_refused(size, difficulty, world, message):
    with pytest.raises(ValueError, match=message):
        render(SEED, 0, size, difficulty, world)
