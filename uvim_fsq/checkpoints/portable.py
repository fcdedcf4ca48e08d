"""Configurations and records without the paths of this machine, for what leaves it: uploads and exports."""

from __future__ import annotations

import re
from pathlib import PureWindowsPath
from typing import Any

from uvim_fsq.checkpoints.hub import leads_outside
from uvim_fsq.checkpoints.layout import ORACLE
from uvim_fsq.config.yaml_files import Tree

#: The folders of an absolute path within a text, such as "tuned on val of /data/rooms"; not those of a URL.
_FOLDERS = re.compile(r"(?<![^\s(='\"])/(?:[^/\s,;)]+/)+")


def portable_config(tree: Tree) -> Tree:
    """A run's configuration without the paths of this machine, of which only the last part is kept.

    The oracle of an LM is the one in the upload; run directory and resumption are left out.
    """
    tree = portable(tree)
    if "oracle" in tree:
        tree["oracle"] = ORACLE
    if isinstance(tree.get("train"), dict):
        tree["train"] |= {"out": "", "resume": "no"}
    return tree


def portable(value: Any) -> Any:
    """A JSON value without the folders of this machine in its texts."""
    if isinstance(value, dict):
        return {key: portable(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [portable(inner) for inner in value]
    if not isinstance(value, str):
        return value
    # Windows' rules know both kinds of slashes.
    return PureWindowsPath(value).name.lstrip("~.") if leads_outside(value) else _FOLDERS.sub("", value)
