"""Too little memory as a user's mistake. Knows nothing of what needed it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from uvim_fsq.errors import UserError

TRAINING = "lower train.batch_size, raise train.accumulate, or choose a smaller model (model.width)"
EVALUATION = "lower eval.batch_size"

#: How torch says so of the host and of a GPU, and of sizes that no memory has.
_WORDS = ("can't allocate memory", "not enough memory", "out of memory", "Storage size calculation overflowed")


@contextmanager
def enough_memory(remedy: str) -> Iterator[None]:
    """Turns an allocation that failed inside into a UserError that ends with `remedy`."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = (str(error) or "out of memory").splitlines()[0]
        if not isinstance(error, MemoryError) and not any(words in text for words in _WORDS):
            raise
        raise UserError(f"too little memory ({text[:160]}); {remedy}") from error
