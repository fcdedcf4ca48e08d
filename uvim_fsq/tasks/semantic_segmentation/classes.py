"""Reads the files in which data sets name their classes. Does not import torch.

Recognized by content: a line for each class, its name with or without a color before or after it (CamVid's
label_colors.txt, the label map of CVAT's exports), or in every line with its pixel value before it; a table with a
header, by commas or tabs (class_dict.csv of many published copies, objectInfo150.txt of ADE20K); JSON, a list or an
object (the id2label.json of model hubs).
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from uvim_fsq.errors import UserError
from uvim_fsq.tasks.legend import class_colors

#: Names of class files that are found without `task.class_file`.
USUAL = ("classes.txt", "classes.csv", "classes.json", "class_dict.csv", "id2label.json", "labelmap.txt",
         "label_colors.txt", "objectInfo150.txt")  # fmt: skip
#: A class: pixel value, name, color as #rrggbb.
Class = tuple[int, str, str]
#: The same before missing colors are filled in.
Partial = tuple[int, str, str | None]
MOST_BYTES, MOST_CLASSES, LONGEST_NAME = 1 << 20, 1000, 80

_COLOR_LAST = re.compile(r"(?P<name>.*?)[\s,;:]+(?P<r>\d{1,3})[\s,]+(?P<g>\d{1,3})[\s,]+(?P<b>\d{1,3})[\s:]*")
_COLOR_FIRST = re.compile(r"(?P<r>\d{1,3})[\s,]+(?P<g>\d{1,3})[\s,]+(?P<b>\d{1,3})[\s,]+(?P<name>.+)")
_NUMBERED = re.compile(r"(?P<value>\d{1,5})[\s.,:;]+(?P<name>.*[^\W\d].*)")
_VALUE_COLUMNS = ("id", "idx", "index", "value", "label")


def find_class_file(root: Path, name: str = "") -> Path:
    """The class file of the data in `root`: `name`, or the first of the `USUAL` names. Raises UserError if missing."""
    if name:
        if not (root / name).is_file():
            raise UserError(f"task.class_file={name}: {root / name} is not a file")
        return root / name
    found = next((root / usual for usual in USUAL if (root / usual).is_file()), None)
    if found is None:
        raise UserError(
            f"{root} holds no file that names the classes (classes.txt with a name in each line, or "
            f"{', '.join(USUAL[1:])}); add one, or set task.class_file"
        )
    return found


def read_classes(file: Path) -> tuple[Class, ...]:
    """The classes that a file names, in its order. Where it gives no pixel values, they are 0, 1, 2, ...

    Raises UserError for a file that is not understood, fewer than two or too many classes, and for names or values that
    are listed twice.
    """
    try:
        if file.stat().st_size > MOST_BYTES:
            raise UserError(f"{file} is larger than {MOST_BYTES >> 20} MiB; it does not name classes")
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read as text ({error})") from error
    found = list(_from_json(text, file) if file.suffix.lower() == ".json" else _from_lines(text, file))
    return check_classes(found, str(file))


def check_classes(found: Sequence[Partial], where: str) -> tuple[Class, ...]:
    """Fills in missing colors. Raises UserError, naming `where`, for classes that cannot be used."""
    if not 2 <= len(found) <= MOST_CLASSES:
        raise UserError(f"{where} names {len(found)} classes; 2 to {MOST_CLASSES} are needed")
    for what, items in (("pixel value", [row[0] for row in found]), ("name", [row[1] for row in found])):
        twice = next((item for i, item in enumerate(items) if item in items[:i]), None)
        if twice is not None:
            raise UserError(f"{where} lists the {what} {twice!r} twice; each class needs its own")
    wrong = next((row for row in found if not 0 <= row[0] < 1 << 16), None)
    if wrong is not None:
        raise UserError(f"{where} gives class {wrong[1]!r} the pixel value {wrong[0]}; values are 0 to 65535")
    for _, name, color in found:
        if len(name) > LONGEST_NAME or not name.isprintable():
            raise UserError(f"{where}: {name[:LONGEST_NAME]!r} is not a name of up to {LONGEST_NAME} characters")
        if color and not re.fullmatch("#[0-9a-fA-F]{6}", color):
            raise UserError(f"{where}: color {color[:60]!r} of class {name!r}; colors are written #rrggbb")
    defaults = class_colors(len(found))[1:]
    return tuple(
        (value, name, color or to_hex(tuple(int(part) for part in default)))
        for (value, name, color), default in zip(found, defaults, strict=True)
    )


def to_hex(color: Iterable[int]) -> str:
    """(red, green, blue) -> #rrggbb."""
    return "#{:02x}{:02x}{:02x}".format(*color)


def _from_lines(text: str, file: Path) -> Iterable[Partial]:
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    delimiter = "\t" if lines and "\t" in lines[0] else ","
    header = [cell.strip().lower() for cell in lines[0].split(delimiter)] if lines else []
    if len(header) > 1 and "name" in header:
        rows = csv.DictReader(lines[1:], fieldnames=header, delimiter=delimiter, skipinitialspace=True)
        yield from (_from_row(row, i, file) for i, row in enumerate(rows))
        return
    found: list[Partial] = []
    numbered: list[re.Match[str] | None] = []
    for i, line in enumerate(lines):
        last = _COLOR_LAST.fullmatch(line)
        match = last or _COLOR_FIRST.fullmatch(line)
        name = _name(line if match is None else match["name"], file)
        found.append((i, name, None if match is None else _color([match["r"], match["g"], match["b"]], file)))
        numbered.append(_NUMBERED.fullmatch(name) if match is last else None)
    if all(numbered):
        found = [(int(m["value"]), m["name"], color) for m, (_, _, color) in zip(numbered, found, strict=True) if m]
    yield from found


def _from_row(row: dict[str, Any], index: int, file: Path) -> Partial:
    column = next((name for name in _VALUE_COLUMNS if row.get(name)), None)
    parts = [row.get(long) or row.get(long[0]) for long in ("red", "green", "blue")]
    color = None if None in parts else _color(parts, file)
    return (index if column is None else _integer(row[column], file)), _name(row.get("name"), file), color


def _from_json(text: str, file: Path) -> Iterable[Partial]:
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON ({error})") from error
    if isinstance(tree, dict):
        tree = [{"id": key, "name": name} for key, name in tree.items()]
    if not isinstance(tree, list):
        raise UserError(f"{file}: expected a list of names, a list of objects with `name`, or an object id -> name")
    for i, entry in enumerate(tree):
        row = entry if isinstance(entry, dict) else {"name": entry}
        color = row.get("color")
        if color is not None and not (isinstance(color, list) and len(color) == 3):
            raise UserError(f"{file}: color {str(color)[:60]} of a class; expected [red, green, blue]")
        value = row.get("id", i)
        yield _integer(value, file), _name(row.get("name"), file), None if color is None else _color(color, file)


def _integer(value: object, file: Path) -> int:
    try:
        if isinstance(value, (int, str)):
            return int(value)
    except ValueError:
        pass
    raise UserError(f"{file}: {str(value)[:60]!r} is not a whole number")


def _name(value: object, file: Path) -> str:
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{file}: {str(value)[:60]!r} is not the name of a class")
    return " ".join(value.split())


def _color(parts: Sequence[object], file: Path) -> str:
    numbers = [_integer(part, file) for part in parts]
    if any(not 0 <= number <= 255 for number in numbers):
        raise UserError(f"{file}: color {numbers}; each part is 0 to 255")
    return to_hex(numbers)
