"""Rows of a data set of the library `datasets` (an extra): saved by `save_to_disk`, or Parquet files of the hub.

Nothing of a data set is run or downloaded: rows come from its Arrow or Parquet files, and pictures are decoded by our
own readers, with their limits.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from uvim_fsq.data.folders import and_list
from uvim_fsq.data.images import read_image
from uvim_fsq.data.splits import SPLITS, split_rows
from uvim_fsq.errors import UserError

TRAIN = "train"
#: Names of the evaluation split, in the order in which they are tried.
VAL = ("validation", "val", "valid", "test")


def is_saved_dataset(root: Path) -> bool:
    """Whether `root` was written by `save_to_disk` or holds Parquet files."""
    return _is_arrow(root) or bool(_parquet_files(root))


@dataclass
class SavedRows:
    """Some rows of a split, read on demand; cheap to pickle.

    Attributes:
        root: the folder.
        part: name of the split in the folder; empty if the folder holds a single table.
        rows: positions in the split.
        columns: the columns that are read.
    """

    root: Path
    part: str
    rows: list[int]
    columns: tuple[str, ...]
    _table: Any = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        # An open file must not be sent to a loader process.
        return {**self.__dict__, "_table": None}

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        """A name of the row `index` that is unique in the data set."""
        return f"{self.part or 'row'}/{self.rows[index]:08d}"

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Column -> content of a picture, bytes; a fixed-size array; or the value as plain Python numbers and lists.

        Raises UserError for a damaged row and for a picture that is not embedded.
        """
        if self._table is None:
            self._table = _undecoded(_load(self.root, self.part), self.columns)
        try:
            row = self._table[self.rows[index]]
        except Exception as error:  # Arrow raises many kinds for damaged files
            raise UserError(
                f"{self.root}, {self.name(index)} cannot be read ({_line(error)}); save it again"
            ) from error
        return {column: self._content(row[column], column, index) for column in self.columns}

    def _content(self, value: Any, column: str, index: int) -> Any:
        if value is None or (isinstance(value, dict) and value.get("bytes") is None):
            # A path may lead anywhere, and rarely exists on another machine.
            raise UserError(
                f"{self.root}, {self.name(index)}: column {column!r} is empty or holds a path, not a picture"
            )
        return value["bytes"] if isinstance(value, dict) else value


def read_photo(content: Any, name: str) -> np.ndarray:
    """The value of a column of photos -> (H, W, 3) uint8 RGB. Raises UserError, naming `name`, if it cannot be read."""
    if not isinstance(content, bytes):
        raise UserError(f"{name}: the column of images holds no pictures; set task.image_column")
    try:
        return read_image(content)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


def open_rows(root: Path, split: str, columns: tuple[str, ...]) -> SavedRows:
    """The rows of a split: train, val ("validation", "test"), holdout or train_minus_holdout.

    Without an evaluation split, every tenth row belongs to val.

    Raises UserError if `datasets` is not installed, and for an unknown split or column.
    """
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    if len(set(columns)) < len(columns):
        raise UserError(f"column {columns[0]!r} is given twice; set the names of the columns of images and labels")
    whole = _load(root, None)
    parts = {"": whole} if not isinstance(whole, dict) else whole
    val = next((name for name in VAL if name in parts), None)
    train = next((name for name in (TRAIN, "") if name in parts), None)
    part = val if split == "val" and val is not None else train
    if part is None:
        wanted = "val" if split == "val" else "train"
        raise UserError(
            f"{root} has the splits {and_list(sorted(parts))}, but no {wanted}; rename one and save it again"
        )
    table = parts[part]
    missing = [column for column in columns if column not in table.column_names]
    if missing:
        raise UserError(
            f"{root} has no column {missing[0]!r}, only {and_list(table.column_names, 12)}; set the column's name"
        )
    rows = list(range(len(table)))
    if val is None:
        rows = rows[::10] if split == "val" else [row for row in rows if row % 10]
    rows = [rows[place] for place in split_rows(split, [f"{part}/{row:08d}" for row in rows])]
    return SavedRows(root, part, rows, columns)


def _load(root: Path, part: str | None) -> Any:
    """The table `part` (empty: the only one), or with None all of them."""
    try:
        # A folder named datasets/ in the working directory can be imported too, as an empty package.
        from datasets import Dataset, disable_progress_bars, load_from_disk  # type: ignore[import-not-found,attr-defined]
    except ImportError as error:
        raise UserError(f"{root} needs the library `datasets`: pip install 'uvim-fsq[datasets]'") from error
    disable_progress_bars()
    try:
        if _is_arrow(root):
            return load_from_disk(str(root / part if part else root))
        files = _parquet_files(root)
        if part is None:
            return {name: Dataset.from_parquet(paths) for name, paths in files.items()}
        return Dataset.from_parquet(files[part])
    except Exception as error:  # Arrow, JSON and the file system raise many kinds
        raise UserError(f"{root} cannot be read as a saved data set ({_line(error)}); save it again") from error


def _is_arrow(root: Path) -> bool:
    return (root / "dataset_dict.json").is_file() or (root / "state.json").is_file()


def _parquet_files(root: Path) -> dict[str, list[str]]:
    """Split -> its Parquet files, under the hub's names: data/train-00000-of-00002.parquet, train/0000.parquet."""
    parts: dict[str, list[str]] = {}
    for path in sorted([*root.glob("*.parquet"), *root.glob("*/*.parquet")]):
        named = re.fullmatch(r"(\w+?)(-\d+-of-\d+(-\w+)?)?", path.stem)
        name = path.parent.name if path.stem.isdigit() or named is None else named[1]
        if name in (TRAIN, *VAL):  # others may be lists that lie beside photos
            parts.setdefault(name, []).append(str(path))
    return parts


def _undecoded(table: Any, columns: tuple[str, ...]) -> Any:
    """The table without formatting, whose pictures stay bytes and whose arrays do not become lists."""
    from datasets import Array2D, Image  # type: ignore[import-not-found,attr-defined]

    table = table.with_format(None).select_columns(list(columns))
    for column in columns:
        if isinstance(table.features[column], Image):
            table = table.cast_column(column, Image(decode=False))
    arrays = [column for column in columns if isinstance(table.features[column], Array2D)]
    return table.with_format("numpy", columns=arrays, output_all_columns=True) if arrays else table


def _line(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:160]
