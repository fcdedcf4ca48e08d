"""`uvim-fsq ablate`: trains and compares a grid of configurations and seeds."""

from __future__ import annotations

import argparse
from pathlib import Path

from uvim_fsq.commands.common import add_overrides, check_places
from uvim_fsq.config.shipped import find_config
from uvim_fsq.errors import UserError

HELP = "train and compare a grid of configurations and seeds"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("grid", help="a grid file, or the name of a shipped one, e.g. ablations/table2_depth-small")
    add_overrides(parser, "settings of all stages of all cells")
    parser.add_argument("--out", type=Path, help="output folder (default: runs/ablations/GRID)")
    parser.add_argument("--only", action="append", metavar="ROW", help="only this row; may be given several times")
    parser.add_argument(
        "--jobs", type=int, help="trainings or evaluations at a time (default: one per GPU; 1 without GPUs)"
    )
    parser.add_argument("--dry-run", action="store_true", help="only print the cells and their commands")


def run(args: argparse.Namespace) -> None:
    """Trains the grid and writes its tables. Exits with code 1 if a cell fails."""
    from uvim_fsq.evaluation.results import finished
    from uvim_fsq.experiments.ablation.devices import find_devices, fit_cells
    from uvim_fsq.experiments.ablation.grid import claim, command_line, make_scenes, plan, read_grid, scenes_command
    from uvim_fsq.experiments.ablation.report import write_results, write_tables
    from uvim_fsq.experiments.ablation.runner import Runner

    if args.jobs is not None and args.jobs < 1:
        raise UserError(f"--jobs {args.jobs}: give at least 1")
    file = find_config(args.grid)
    grid = read_grid(file)
    out = args.out or Path("runs/ablations") / file.stem
    cells = plan(grid, out, args.overrides)
    rows = [row.name for row in grid.rows]
    unknown = [name for name in args.only or [] if name not in rows]
    if unknown:
        raise UserError(f"--only {unknown[0]!r}: no such row; rows: {'; '.join(rows)}")
    chosen = [cell for cell in cells if not args.only or cell.row in args.only]
    devices = find_devices()
    jobs = args.jobs or max(len(devices.names), 1)
    chosen = fit_cells(chosen, devices, jobs, print)
    if args.dry_run:
        if (scenes := scenes_command(grid, out)) is not None:
            print(f"scenes\n  {command_line(scenes)}")
        for cell in chosen:
            print(f"{cell.name}{' (finished)' if finished(cell.result.folder, cell.file) else ''}")
            for _, _, _, commands in cell.steps:
                print("\n".join(f"  {command_line(command)}" for command in commands))
        return
    check_places(folders=[out])
    claim(out, grid, args.overrides)
    make_scenes(grid, out, print)
    runner = Runner(
        out,
        jobs,
        devices.names,
        say=lambda line: print(line, flush=True),
        after_cell=lambda failures: write_tables(out, grid, cells, failures),
    )
    runner.run(chosen)
    _print_lines(write_results(out, grid, cells, runner.failures), out)
    if runner.failures:
        raise SystemExit(1)


def _print_lines(lines: list[list[str]], out: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for i, head in enumerate(lines[0]):
        table.add_column(head, justify="left" if i == 0 else "right")
    for line in lines[1:]:
        table.add_row(*line)
    Console().print(table)
    print(f"report: {out / 'report.html'}   table: {out / 'table.md'}   results: {out / 'results.json'}")
