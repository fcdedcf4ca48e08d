"""Where `data.root` lies on disk."""

from __future__ import annotations

import os
from pathlib import Path

from uvim_fsq.errors import UserError


def find_data_root(root: str) -> Path:
    """The folder behind `data.root`: absolute, or under $UVIM_FSQ_DATA (default datasets/), or relative to here."""
    if not root:
        raise UserError("data.root is empty; give the data set's folder, e.g. data.root=nyudepthv2")
    # Of an absolute path both are the same.
    tried = list(dict.fromkeys([Path(os.environ.get("UVIM_FSQ_DATA", "datasets")) / root, Path(root)]))
    for path in tried:
        if path.exists():
            return path
    raise UserError(f"data.root={root}: no such folder; looked for {' and '.join(map(str, tried))}")
