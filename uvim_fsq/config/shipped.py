"""Finds the configurations that ship with the package by name, from any folder: "nyu_depth/oracle"."""

from __future__ import annotations

import difflib
from pathlib import Path

from uvim_fsq.errors import UserError


def shipped_folder() -> Path:
    """The folder `configs/`: inside the installed package, or next to the package in a clone."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def shipped_names() -> list[str]:
    """The names of all shipped configurations and grids, e.g. "nyu_depth/oracle"."""
    folder = shipped_folder()
    return sorted(file.relative_to(folder).with_suffix("").as_posix() for file in folder.rglob("*.yaml"))


def find_config(name: str | Path) -> Path:
    """Resolves `name` to a file: an existing path, or else the name of a shipped configuration.

    "configs/nyu_depth/oracle.yaml", as written in the documentation, also finds the shipped file outside of a clone.

    Raises UserError with the closest shipped name if there is neither.
    """
    if not str(name):
        raise UserError("the configuration's name is empty; give a file, or a shipped name such as nyu_depth/oracle")
    path = Path(name)
    if path.is_file():
        return path
    if path.is_dir() and any(path.glob("*.yaml")):
        inside = ", ".join(str(file) for file in sorted(path.glob("*.yaml"))[:3])
        raise UserError(f"{path} is a folder; give one of its files, e.g. {inside}")
    wanted = path.as_posix().removeprefix("configs/").removesuffix(".yaml")
    names = shipped_names()
    if wanted in names:
        return shipped_folder() / f"{wanted}.yaml"
    close = difflib.get_close_matches(wanted, names, n=1)
    hint = f"did you mean {close[0]}?" if close else "shipped configurations have names such as nyu_depth/oracle"
    raise UserError(f"{path}: no such configuration file, and no shipped configuration of that name; {hint}")
