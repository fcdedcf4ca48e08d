"""The steps of decoding and the groups of the compression cost: they cover every position once."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uvim_fsq.lm.masked_schedules import group_sizes, low_discrepancy_order, uncovering_groups, unknown_counts


@st.composite
def lengths_and_steps(draw: st.DrawFn) -> tuple[int, int]:
    length = draw(st.integers(1, 300))
    return length, draw(st.integers(1, length))


@given(lengths_and_steps())
def test_every_step_determines_at_least_one_token_and_the_last_leaves_none(case: tuple[int, int]) -> None:
    length, steps = case
    counts = unknown_counts(length, steps)
    assert counts[0] == length and len(counts) == steps
    determined = [before - after for before, after in itertools.pairwise((*counts, 0))]
    assert min(determined) >= 1 and sum(determined) == length


@given(lengths_and_steps())
def test_no_more_tokens_are_unknown_than_the_cosine_says(case: tuple[int, int]) -> None:
    length, steps = case
    for step, count in enumerate(unknown_counts(length, steps)):
        assert count <= math.floor(length * math.cos(math.pi / 2 * step / steps))


def test_steps_follow_the_cosine_where_each_has_tokens_to_determine() -> None:
    assert unknown_counts(256, 4) == (256, 236, 181, 97)  # floor of 256, 236.5, 181.02, 97.97
    assert unknown_counts(16, 1) == (16,)
    assert unknown_counts(5, 5) == (5, 4, 3, 2, 1)


@given(st.integers(1, 300), st.integers(1, 12))
def test_groups_have_all_positions_and_never_shrink(length: int, groups: int) -> None:
    sizes = group_sizes(length, min(groups, length))
    assert len(sizes) == min(groups, length) and sum(sizes) == length
    assert sizes[0] >= 1 and list(sizes) == sorted(sizes)


def test_groups_grow_by_the_power_law() -> None:
    # 256 (s / 8)^2.2 is 2.6, 12.1, 29.6, 55.7, 91.0, 136.0, 190.8, 256
    assert group_sizes(256) == (3, 9, 18, 26, 35, 45, 55, 65)
    assert group_sizes(8) == (1,) * 8


@given(st.integers(1, 300))
def test_each_position_is_uncovered_once(length: int) -> None:
    groups = uncovering_groups(length)
    assert len(groups) == min(8, length)
    assert sorted(itertools.chain(*groups)) == list(range(length))
    assert [len(group) for group in groups] == list(group_sizes(length, len(groups)))


def test_cells_come_in_the_order_in_which_the_points_hit_them() -> None:
    # Columns n / 1.3247 and rows n / 1.7549, modulo 1: (0.755, 0.570), (0.510, 0.140), (0.265, 0.709), (0.020, 0.279)
    assert low_discrepancy_order(16)[:4] == [2 * 4 + 3, 0 * 4 + 2, 2 * 4 + 1, 1 * 4 + 0]


@pytest.mark.parametrize("length", [16, 256])
def test_early_positions_are_spread_over_the_grid(length: int) -> None:
    """The first quarter has positions in each quadrant, about as many in one as in another."""
    side = math.isqrt(length)
    quadrants = [0] * 4
    for position in low_discrepancy_order(length)[: length // 4]:
        quadrants[2 * (position // side * 2 // side) + position % side * 2 // side] += 1
    assert max(quadrants) - min(quadrants) <= max(1, length // 64)
