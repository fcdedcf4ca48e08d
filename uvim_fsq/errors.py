"""The exception for user errors. The command line prints it as one line and exits with code 2."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager


class UserError(ValueError):
    """An error that the user can fix. The message says what is wrong and what to do.

    Raised for any bad input: paths, keys, values, files. Library code can catch it as a `ValueError`.
    """


#: Advice for `enough_memory` to end its message with.
TRAINING_REMEDY = "lower train.batch_size, raise train.accumulate, or choose a smaller model (model.width)"
EVALUATION_REMEDY = "lower eval.batch_size"
#: Fragments of torch's messages for a failed allocation on the host or a GPU, and for a size that overflows.
_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "Storage size calculation overflowed")


@contextmanager
def enough_memory(remedy: str) -> Generator[None]:
    """Converts an out-of-memory error raised in the block into a UserError that ends with `remedy`."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = (str(error) or "out of memory").splitlines()[0]
        if not isinstance(error, MemoryError) and not any(words in text for words in _OUT_OF_MEMORY):
            raise
        raise UserError(f"not enough memory ({text[:160]}); {remedy}") from error


def first_line(error: BaseException) -> str:
    """The first line of an error's text, at most 160 characters, or the name of its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]
