"""Chunk sizes that bound how many one-hot labels or logits are in memory at a time."""

from __future__ import annotations

#: The largest number of one-hot labels or logits in memory at a time; anything larger is processed in chunks. With
#: their float32 copies and gradients, 2^28 logits take 2 to 5 GB. Smaller chunks are slower, because each chunk reads
#: the weights and accumulates their gradient.
MAX_LOGITS = 2**28


def even_slices(length: int, max_size: int) -> list[slice]:
    """Splits range(length) into the fewest slices of at most max(1, max_size) elements, as evenly as possible."""
    count = -(-length // max(1, max_size))
    size = -(-length // count)
    return [slice(first, min(first + size, length)) for first in range(0, length, size)]


def chunk_slices(length: int, logits: int) -> list[slice]:
    """Splits range(length) into slices of at most `MAX_LOGITS` logits, given `logits` per index."""
    return even_slices(length, MAX_LOGITS // logits)


def fits_one_chunk(length: int, logits: int) -> bool:
    """Whether `chunk_slices` returns a single slice."""
    return length <= max(1, MAX_LOGITS // logits)
