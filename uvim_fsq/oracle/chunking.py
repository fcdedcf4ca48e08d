"""How many one-hot labels or logits exist at a time."""

from __future__ import annotations

#: Most one-hot labels or logits that exist at a time; what holds more is done in pieces. With their float32 copies and
#: gradients 2^28 logits are 2 to 5 GB. Smaller pieces are slower: each reads the weights and adds to their gradient.
MAX_LOGITS = 2**28


def even_slices(length: int, most: int) -> list[slice]:
    """0..length in the fewest slices of at most `most` (but at least one) each, as even as can be."""
    count = -(-length // max(1, most))
    size = -(-length // count)
    return [slice(first, min(first + size, length)) for first in range(0, length, size)]


def chunk_slices(length: int, logits: int) -> list[slice]:
    """0..length in slices that hold at most `MAX_LOGITS` logits, of `logits` for each index."""
    return even_slices(length, MAX_LOGITS // logits)
