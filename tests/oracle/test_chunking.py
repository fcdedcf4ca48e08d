"""Slices that hold at most a given number of items."""

from __future__ import annotations

from uvim_fsq.oracle.chunking import even_slices


def test_slices_are_even_and_complete() -> None:
    assert even_slices(7, 3) == [slice(0, 3), slice(3, 6), slice(6, 7)]
    assert even_slices(8, 5) == [slice(0, 4), slice(4, 8)]
    assert even_slices(3, 0) == [slice(0, 1), slice(1, 2), slice(2, 3)]  # at least one each
    assert even_slices(5, 5) == even_slices(5, 99) == [slice(0, 5)]
