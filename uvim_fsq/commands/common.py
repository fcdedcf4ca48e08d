"""Helpers shared by commands: checks that do not need torch, tables, and hints about the next command."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from uvim_fsq.console import is_first, say
from uvim_fsq.files import check_file, check_folder


def add_overrides(parser: argparse.ArgumentParser, text: str = "settings that override the file") -> None:
    """Adds the trailing `key=value` arguments."""
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=text)


def check_places(files: Sequence[Path | None] = (), folders: Sequence[str | Path] = ()) -> None:
    """Raises UserError for output files and folders that cannot be written, before there is anything to write."""
    if is_first():
        for file in filter(None, files):
            check_file(file)
        for folder in folders:
            check_folder(Path(folder))


def check_run(run: str | Path, overrides: Sequence[str]) -> dict[str, list[Any]]:
    """Checks a run and its overrides before torch is imported.

    Returns:
        The settings that differ from those of training, key -> [trained value, new value].

    Raises:
        UserError: there is no such run, or an override is invalid.
    """
    from uvim_fsq.checkpoints.run_directory import resolve_checkpoint
    from uvim_fsq.checkpoints.tuned import read_for_prediction

    changed = read_for_prediction(resolve_checkpoint(run), overrides)[1]
    say(f"{run}: loading ...")
    return changed


def say_next_of_predictor(run: str | Path) -> None:
    """Prints what can be done with a trained language model or direct model."""
    say(f"next: uvim-fsq predict {run} PHOTOS --out predictions, or uvim-fsq evaluate {run} --report report.html")


def say_next_of_data(task: str, root: str) -> None:
    """Prints what can be done with a data set."""
    from uvim_fsq.tasks.registry import BUILT_IN

    config = f"{task}/oracle" if task in BUILT_IN else "ORACLE_CONFIG.yaml"
    say(f"next: uvim-fsq train-oracle {config} data.root={root} train.out=...")


def print_result(result: dict[str, Any]) -> None:
    """Prints the metrics of an evaluation as a table, with the data and the checkpoint that they belong to."""
    from rich.console import Console
    from rich.table import Table

    from uvim_fsq.checkpoints.identity import describe_overrides
    from uvim_fsq.checkpoints.tuned import FROM_RUN

    figures: dict[str, dict[str, float]] = result["figures"]
    data = ", ".join(f"{key} {value}" for key, value in result["data"].items())
    table = Table(title=f"{result['protocol']} ({data})")
    table.add_column("")
    for name in figures:
        table.add_column(name, justify="right")
    for metric in dict.fromkeys(metric for values in figures.values() for metric in values):
        table.add_row(metric, *(f"{values[metric]:.4f}" if metric in values else "" for values in figures.values()))
    Console().print(table)
    for found in result["intervals"]:
        print(
            f"{found['first']} - {found['second']}: {found['metric']} {found['difference']:+.4f} "
            f"(95% interval {found['low']:+.4f} to {found['high']:+.4f}, paired bootstrap over images)"
        )
    limit = f", first {result['limit']} images only" if result["limit"] else ""
    if result["overrides"]:
        print(describe_overrides(result["overrides"]))
    if result["decoding_from"] != FROM_RUN:
        print(f"decoding: {result['decoding_from']}")
    print(f"{result['images']} images{limit}; checkpoint {result['checkpoint']} ({result['checkpoint_sha256'][:12]})")
