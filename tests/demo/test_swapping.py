"""Tokens exchanged between two images of the data set."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from uvim_fsq.checkpoints.loading import load_checkpoint
from uvim_fsq.demo.swapping import TokenSwap, toggle
from uvim_fsq.errors import UserError
from uvim_fsq.experiments.code_pictures import Painter

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def swap(oracle_dir: Path) -> TokenSwap:
    return TokenSwap(load_checkpoint(oracle_dir), CPU)


def test_nothing_changes_without_a_swap(swap: TokenSwap) -> None:
    found = swap.show(0, 3)
    assert swap.count == 6 and found.scale is None and "0 of 4 tokens" in found.text
    for side in found.sides:
        assert np.array_equal(side.own, side.now) and side.change is not None
        assert len(np.unique(side.change.reshape(-1, 3), axis=0)) == 1
        assert side.photo.shape == side.own.shape == (24, 32, 3) and side.truth is not None
    assert found.sides[0].name != found.sides[1].name


def test_swapped_tokens_are_decoded_with_the_other_image(swap: TokenSwap, oracle_dir: Path) -> None:
    painter = Painter(load_checkpoint(oracle_dir), CPU, [1, 4])
    found = swap.show(1, 4, range(4))
    assert np.array_equal(found.sides[0].now, painter.decoded(painter.tokens[1], 0))
    assert np.array_equal(found.sides[1].now, painter.decoded(painter.tokens[0], 1))
    mixed = painter.tokens[0].copy()
    mixed[2] = painter.tokens[1][2]
    one = swap.show(1, 4, [2])
    assert np.array_equal(one.sides[0].now, painter.decoded(mixed, 0)) and "1 of 4 tokens" in one.text


def test_the_change_is_the_difference_in_meters(swap: TokenSwap, oracle_dir: Path) -> None:
    painter = Painter(load_checkpoint(oracle_dir), CPU, [1, 4])
    own, now = (painter.predicted(tokens, 0) for tokens in painter.tokens)
    task = painter.task
    difference = np.abs(task.to_size(own, painter.samples[0].image) - task.to_size(now, painter.samples[0].image))
    found = swap.show(1, 4, range(4)).sides[0].change
    assert found is not None
    brightness, order = found.astype(int).sum(-1).ravel(), np.argsort(difference.ravel(), kind="stable")
    assert difference.max() > 0 and (np.diff(brightness[order]) >= 0).all()


def test_clicks_add_tokens_and_take_them_back() -> None:
    assert toggle(toggle([], 3), 1) == [1, 3] and toggle([1, 3], 3) == [1]


@pytest.mark.parametrize(("indices", "places"), [((0, 6), []), ((-1, 0), []), ((0, 1), [4]), ((0, 1), [-1])])
def test_images_and_tokens_that_do_not_exist_are_refused(
    swap: TokenSwap, indices: tuple[int, int], places: list[int]
) -> None:
    with pytest.raises(UserError, match="image|token"):
        swap.show(*indices, places)
