"""The one exception for a user's mistake, which the command line prints as one line before it exits with code 2."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager


class UserError(ValueError):
    """Something the user can put right; the message says what is wrong and what to do.

    Raised for bad input of every kind (paths, keys, values, files). Library callers can catch it as a `ValueError`.
    """


#: Remedies for `enough_memory`.
TRAINING_REMEDY = "lower train.batch_size, raise train.accumulate, or choose a smaller model (model.width)"
EVALUATION_REMEDY = "lower eval.batch_size"
#: How torch says so of the host and of a GPU, and of sizes that no memory has.
_WORDS = ("can't allocate memory", "not enough memory", "out of memory", "Storage size calculation overflowed")


@contextmanager
def enough_memory(remedy: str) -> Generator[None]:
    """Turns an allocation that failed inside into a UserError that ends with `remedy`."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = (str(error) or "out of memory").splitlines()[0]
        if not isinstance(error, MemoryError) and not any(words in text for words in _WORDS):
            raise
        raise UserError(f"too little memory ({text[:160]}); {remedy}") from error
