"""Names of files that a data set's own lists hold: they stay inside its folder. Knows nothing of formats."""

from __future__ import annotations

import re
from pathlib import Path

from uvim_fsq.errors import UserError


def inner_name(name: object, source: Path) -> str:
    """`name`, a path with slashes that a file of the data set gives, if it lies below whatever folder it is put under.

    Args:
        source: the file that gives it, for the message.

    Raises UserError for absolute paths, `..`, backslashes and drives (which Windows would follow) and null bytes.
    """
    text = str(name)
    parts = text.split("/")
    if not text or text[0] == "/" or ".." in parts or re.search(r"[\\\0]|^[A-Za-z]:", text):
        raise UserError(
            f"{source} names the file {text[:200]!r}, which leads out of the data set; give paths below its folder, "
            "with slashes"
        )
    return text
