"""Somebody else's figures, read from a file, to be shown beside ours (`uvim-fsq benchmark --peer FILE`)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uvim_fsq.config.parse import short
from uvim_fsq.errors import UserError
from uvim_fsq.performance.timing import Measurement, more_is_better

MAX_BYTES = 1_000_000
#: Unit -> the unit that measurements have, and its size in that unit.
UNITS = {
    "images/s": ("images/s", 1.0),
    "ms": ("ms", 1.0),
    "s": ("ms", 1000.0),
    "us": ("ms", 0.001),
    "MB": ("MB", 1.0),
    "GB": ("MB", 1000.0),
}
KEYS = ("name", "about", "rows")


@dataclass(frozen=True)
class Peer:
    """Figures of another program.

    Attributes:
        name: the title of their column.
        about: how they were measured; one line.
        rows: name of a measurement -> value and unit, in the units of measurements.
    """

    name: str
    about: str
    rows: Mapping[str, tuple[float, str]]


def read_peer(file: Path) -> Peer:
    """Reads a JSON object with the keys of `KEYS`: `rows` maps the name of a measurement, as the table prints it, to an
    object with `value`, a positive number, and `unit`, one of `UNITS`.

    Raises UserError, naming the file and the row, for anything else.
    """
    tree = _read(file)
    unknown = [key for key in tree if key not in KEYS]
    if unknown:
        raise UserError(f"{file}: unknown key {short(unknown[0])}; known keys: {', '.join(KEYS)}")
    rows = tree.get("rows")
    if not isinstance(rows, dict) or not rows:
        raise UserError(f'{file}: `rows` must hold at least one row, such as "NAME": {{"value": 1.9, "unit": "ms"}}')
    name, about = _text(tree, "name", file, 40), _text(tree, "about", file, 1000)
    return Peer(name, about, {row: _figure(file, row, entry) for row, entry in rows.items()})


def _read(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as opened:
            content = opened.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from None
    if len(content) > MAX_BYTES:
        raise UserError(f"{file} is longer than {MAX_BYTES} bytes; it cannot be a file of figures")
    try:
        tree = json.loads(content, object_pairs_hook=_without_duplicates)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    except (ValueError, RecursionError):
        raise UserError(f"{file} is not valid JSON; docs/performance.md shows an example") from None
    if not isinstance(tree, dict):
        raise UserError(f"{file} must hold a JSON object with the keys {', '.join(KEYS)}")
    return tree


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise UserError(f"{short(key)} is given twice; remove one of them")
        found[key] = value
    return found


def _text(tree: Mapping[str, Any], key: str, file: Path, limit: int) -> str:
    value = tree.get(key, "")
    if not isinstance(value, str) or len(value) > limit or not (value.isprintable() and "|" not in value):
        raise UserError(f"{file}: `{key}` must be one line of at most {limit} characters without |")
    if key == "name" and not value.strip():
        raise UserError(f"{file}: `name`, the title of the column, is missing")
    return value.strip()


def _figure(file: Path, row: str, entry: Any) -> tuple[float, str]:
    where = f"{file}, row {short(row)}"
    if not isinstance(entry, dict) or entry.keys() != {"value", "unit"}:
        raise UserError(f'{where}: must be an object such as {{"value": 1.9, "unit": "ms"}}')
    value, unit = entry["value"], entry["unit"]
    if not isinstance(unit, str) or unit not in UNITS:
        raise UserError(f"{where}: unit={short(unit)} must be one of {', '.join(UNITS)}")
    base, size = UNITS[unit]
    try:
        number = float(value) * size if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
    except OverflowError:
        number = math.inf
    if not 0 < number < 1e15:
        raise UserError(f"{where}: value={short(value)} must be a positive number below 1e15")
    return number, base


def unmatched(peer: Peer, lines: Sequence[Measurement], file: Path) -> list[str]:
    """What to say about rows of `peer` that cannot be shown: those that were not measured, or in another unit."""
    measured = {line.name: line.unit for line in lines}
    notes = [
        f"note: {file}, row {short(row)}: {unit} cannot be compared with {measured[row]}"
        for row, (_, unit) in peer.rows.items()
        if measured.get(row, unit) != unit
    ]
    absent = [row for row in peer.rows if row not in measured]
    if absent:
        notes.append(
            f"note: {len(absent)} of {len(peer.rows)} rows of {file} were not measured, e.g. {short(absent[0])}"
        )
    return notes


def compared(peer: Peer, line: Measurement) -> tuple[float, float] | None:
    """Their value in our unit, and how many times better ours is; None if they have none."""
    value, unit = peer.rows.get(line.name, (0.0, ""))
    if unit != line.unit:
        return None
    return value, line.value / value if more_is_better(line.unit) else value / line.value
