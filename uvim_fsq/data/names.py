"""Checks file names that a data set's own lists contain: they must stay inside its folder. Independent of formats."""

from __future__ import annotations

import re
from pathlib import Path

from uvim_fsq.errors import UserError


def inner_name(name: object, source: Path) -> str:
    """Returns `name` as text if it is a relative path that cannot leave the folder it is joined to.

    Args:
        name: a path with forward slashes, as listed in a file of the data set.
        source: the file that lists it, for the message.

    Raises UserError for absolute paths, `..`, null bytes, and backslashes and drive letters (which Windows follows).
    """
    text = str(name)
    parts = text.split("/")
    if not text or text[0] == "/" or ".." in parts or re.search(r"[\\\0]|^[A-Za-z]:", text):
        raise UserError(
            f"{source} lists the file {text[:200]!r}, which lies outside of the data set; use relative paths with "
            "forward slashes"
        )
    return text
