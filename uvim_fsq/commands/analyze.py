"""`uvim-fsq analyze`: shows what a run's codes encode."""

from __future__ import annotations

import argparse
from pathlib import Path

from uvim_fsq.commands.common import add_overrides, check_places, check_run, print_result
from uvim_fsq.files import inside

HELP = "show what a run's codes encode and how much its predictions depend on them"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("run", help="run or checkpoint directory of either stage, or hub:OWNER/NAME@REVISION")
    add_overrides(parser, "e.g. eval.seed=1 data.eval_split=train")
    parser.add_argument(
        "--out", type=Path, help="folder for analysis.json, report.html and pictures (default: RUN/analysis)"
    )
    parser.add_argument("--limit", type=int, help="use only the first N images")


def run(args: argparse.Namespace) -> None:
    """Analyzes the run, prints a table and writes a report."""
    from uvim_fsq.checkpoints.hub import results_folder

    check_run(args.run, args.overrides)
    place = results_folder(args.run)
    out = args.out or place / "analysis"
    if args.out is None:
        inside(place, out / "analysis.json")
    check_places(folders=[out])

    from uvim_fsq import processes
    from uvim_fsq.experiments.analysis import analyze_run

    result = analyze_run(args.run, args.overrides, out=out, limit=args.limit)
    if not processes.is_main():
        return
    print_result(result)
    for name, text in result["descriptions"].items():
        print(f"{name}: {text}")
    print(f"written: {out / 'report.html'}, {out / 'analysis.json'} and the pictures")
