"""When a masked token model predicts which positions: the steps of decoding, and the groups of the compression cost.

L code length, T decoding steps.
"""

from __future__ import annotations

import functools
import itertools
import math

#: Groups of the compression cost; more hardly lower it (M2T, arXiv 2304.07313).
GROUPS = 8
#: Exponent of the growth of the groups (M2T).
GROUP_GROWTH = 2.2
#: The real solution of x^3 = x + 1, the base of Roberts' low-discrepancy sequence in two dimensions.
PLASTIC = 1.324717957244746


def unknown_counts(length: int, steps: int) -> tuple[int, ...]:
    """The number of tokens that are unknown before each of T steps, of which the last one leaves none.

    After step t = 0, ..., T - 1 it is floor(L cos(pi / 2 (t + 1) / T)) (MaskGIT, arXiv 2202.04200), or less, so that
    each step determines at least one token. Requires 1 <= T <= L.
    """
    counts = [length]
    for step in range(1, steps):
        scheduled = math.floor(length * math.cos(math.pi / 2 * step / steps))
        counts.append(min(scheduled, counts[-1] - 1))
    return tuple(counts)


def group_sizes(length: int, groups: int = GROUPS) -> tuple[int, ...]:
    """The sizes of `groups` groups of positions, at least 1, never decreasing, of sum L.

    The first s of S groups contain about L (s / S)^2.2 positions (M2T's power schedule). Requires `groups` <= L.
    """
    ends = [max(s, round(length * (s / groups) ** GROUP_GROWTH)) for s in range(groups + 1)]
    # Rounding may exchange two sizes that differ by 1.
    return tuple(sorted(end - start for start, end in itertools.pairwise(ends)))


def low_discrepancy_order(length: int) -> list[int]:
    """All positions in the order in which a low-discrepancy sequence visits them (M2T).

    The positions are the first L cells of a square grid in row-major order. Point n = 1, 2, ... of Roberts' sequence is
    at column n / p and row n / p^2 (modulo 1, in units of the side), with p = `PLASTIC`; a cell counts when it is first
    hit.
    """
    side = math.ceil(math.sqrt(length))
    order: dict[int, None] = {}
    for n in itertools.count(1):
        cell = int(n / PLASTIC**2 % 1 * side) * side + int(n / PLASTIC % 1 * side)
        if cell < length:
            order[cell] = None
        if len(order) == length:
            return list(order)
    raise AssertionError("unreachable")


@functools.cache
def uncovering_groups(length: int) -> tuple[tuple[int, ...], ...]:
    """The positions in the groups in which M2T's deterministic schedule uncovers them, at most `GROUPS`."""
    order = iter(low_discrepancy_order(length))
    return tuple(tuple(itertools.islice(order, size)) for size in group_sizes(length, min(GROUPS, length)))
