"""Finds the folder that `data.root` refers to."""

from __future__ import annotations

import os
from pathlib import Path

from uvim_fsq.errors import UserError


def find_data_root(root: str) -> Path:
    """The folder for `data.root`: an absolute path, or one relative to $UVIM_FSQ_DATA (default: datasets/) or to the
    working directory, whichever exists first. Raises UserError if none exists.
    """
    if not root:
        raise UserError("data.root is empty; set it to the data set's folder, e.g. data.root=nyudepthv2")
    # For an absolute path, both are the same.
    tried = list(dict.fromkeys([Path(os.environ.get("UVIM_FSQ_DATA", "datasets")) / root, Path(root)]))
    for path in tried:
        if path.exists():
            return path
    raise UserError(f"data.root={root}: no such folder; looked for {' and '.join(map(str, tried))}")
