"""`uvim-fsq runs`: lists the runs below a folder."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uvim_fsq.console import printable

if TYPE_CHECKING:
    from uvim_fsq.experiments.run_list import ListedRun

HELP = "list the runs below a folder"
KEYS = ("run", "task", "stage", "steps", "state", "metric", "figure", "protocol", "date")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("folder", nargs="?", default="runs", help="folder to search (default: runs)")
    parser.add_argument("--sort", choices=KEYS, default="run", help="the column to sort by (default: run)")
    parser.add_argument("--json", action="store_true", help="print a JSON list instead of a table")


def run(args: argparse.Namespace) -> None:
    """Prints the list."""
    from uvim_fsq.experiments.run_list import list_runs

    found = sorted(list_runs(Path(args.folder)), key=lambda listed: _order(getattr(listed, args.sort)))
    if args.json:
        print(json.dumps([_entry(listed) for listed in found], indent=2))
    elif not found:
        print(f"{printable(args.folder)}: no runs")
    else:
        _print_table(found)


def _entry(listed: ListedRun) -> dict[str, Any]:
    """A run for JSON, which has no NaN."""
    entry = asdict(listed)
    return entry if listed.figure is None or math.isfinite(listed.figure) else {**entry, "figure": None}


def _order(value: Any) -> tuple[bool, Any]:
    """Sorts what is missing, or not a number, last."""
    missing = value is None or value == "" or value != value
    return missing, 0 if missing else value


def _print_table(found: list[ListedRun]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for column in ("run", "task", "stage", "steps", "state", "figure", "protocol", "date"):
        table.add_column(column, justify="right" if column in ("steps", "figure") else "left", overflow="fold")
    for listed in found:
        # Text, not strings, in which brackets would be markup; names may hold anything.
        table.add_row(*(Text(printable(cell)) for cell in _cells(listed)))
    console = Console()
    # A file or pipe has no width, and a table that is cut there could not be searched.
    console.print(table) if console.is_terminal else Console(width=240).print(table)
    for listed in found:
        if listed.problem:
            print(f"{printable(listed.run)}: {printable(listed.problem)}")


def _cells(listed: ListedRun) -> list[str]:
    steps = "" if listed.steps is None else str(listed.steps)
    planned = f" of {listed.planned}" if listed.planned else ""
    figure = "" if listed.figure is None else f"{listed.metric} {listed.figure:.4g}"
    date = listed.date.replace("T", " ").removesuffix("Z")[:16]
    return [listed.run, listed.task, listed.stage, steps + planned, listed.state, figure, listed.protocol, date]
