"""Still lifes: few large objects in a clear order, and materials whose gray image does not tell their hue."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.support.photos import LUMA
from uvim_fsq.synthetic import still_life
from uvim_fsq.synthetic.render import STUFF, Scene, render
from uvim_fsq.synthetic.rooms import Dice
from uvim_fsq.synthetic.still_life import CHOICES, MATERIALS, albedo

SEED, SIZE = 5, 48


def still(index: int, difficulty: str = "plain", size: int = SIZE) -> Scene:
    return render(SEED, index, size, difficulty, "still_life")


def things(scene: Scene) -> list[np.ndarray]:
    """The mask of each object."""
    return [scene.segments == info["id"] for info in scene.segments_info if info["name"] not in STUFF]


def center(mask: np.ndarray) -> float:
    """The key by which panoptic labels number segments: the row, and a little of the column, of the center of mass."""
    rows, columns = np.nonzero(mask)
    return rows.mean() + columns.mean() / len(mask)


@pytest.mark.slow
def test_objects_are_few_large_and_wholly_in_view() -> None:
    counts = []
    for index in range(100):
        masks = things(still(index))
        counts.append(len(masks))
        border = np.ones((SIZE, SIZE), bool)
        border[1:-1, 1:-1] = False
        assert min(mask.mean() for mask in masks) > 0.02 and not any((mask & border).any() for mask in masks)
    assert set(counts) <= {2, 3, 4} and min(np.bincount(counts)[2:4]) > 30


@pytest.mark.slow
def test_the_order_of_segments_is_nearly_always_clear() -> None:
    """Their centers of mass differ by a pixel of 48, so that their numbers can be told from the image."""
    gaps = []
    for index in range(100):
        scene = still(index)
        keys = sorted(center(scene.segments == info["id"]) for info in scene.segments_info)
        gaps.append(np.diff(keys).min())
    assert np.mean(np.array(gaps) > 1) > 0.85


@pytest.mark.slow
def test_varied_still_lifes_keep_their_objects_inside_the_room() -> None:
    for index in range(60):
        scene = still(index, "varied")
        assert scene.depth.min() > 0.3 and scene.depth.max() < 9.9 and things(scene)


def test_every_surface_and_object_has_a_material_with_a_few_hues() -> None:
    assert {name for choices in CHOICES.values() for name in choices} == set(MATERIALS)
    several = [name for name, material in MATERIALS.items() if len(material.hues) > 1]
    assert len(several) > 10 and all(len(material.hues) <= 4 for material in MATERIALS.values())


def test_an_albedo_has_the_given_luma_and_hue() -> None:
    for hue in np.linspace(0, 1, 13):
        for luma in (0.2, 0.5, 0.9):
            display = np.sqrt(albedo(float(hue), 1.2, luma))
            assert display @ LUMA / LUMA.sum() == pytest.approx(luma, abs=1e-9)
            assert display.min() >= 0 and display.max() <= 1 + 1e-12
    red, green, blue = np.sqrt(albedo(1 / 3, 0.5, 0.4))
    assert green - red == pytest.approx(0.2) and red == pytest.approx(blue)


def test_the_gray_image_does_not_tell_the_hue(monkeypatch: pytest.MonkeyPatch) -> None:
    """With all hues replaced by others, the colors change and the gray image hardly does."""
    before = [still(index).image.astype(float) for index in range(8)]
    turned = {
        name: replace(material, hues=tuple((hue + 0.5, chroma) for hue, chroma in material.hues))
        for name, material in MATERIALS.items()
    }
    monkeypatch.setattr(still_life, "MATERIALS", turned)
    after = [still(index).image.astype(float) for index in range(8)]
    for old, new in zip(before, after, strict=True):
        assert np.abs(old - new).mean() > 10
        assert np.abs(old @ LUMA - new @ LUMA).mean() < 2.5


def test_a_material_comes_in_each_of_its_hues(monkeypatch: pytest.MonkeyPatch) -> None:
    red_or_green = replace(MATERIALS["fruit skin"], hues=((0.0, 1.0), (1 / 3, 1.0)))
    monkeypatch.setattr(still_life, "MATERIALS", dict.fromkeys(MATERIALS, red_or_green))
    dice = Dice(np.random.default_rng(0))
    looks = [still_life.draw_look(dice, "sphere", True) for _ in range(100)]
    counts = np.bincount([int(np.argmax(look.bright)) for look in looks], minlength=3)
    assert counts[2] == 0 and counts[:2].min() > 30
