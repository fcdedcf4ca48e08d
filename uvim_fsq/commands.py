"""What each command of `uvim-fsq` does: thin functions of the parsed arguments over the package."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from uvim_fsq.errors import UserError

# Heavy imports stay inside the commands, so that --help answers at once.


def command_config(args: argparse.Namespace) -> None:
    """Prints the resolved configuration, as far as it can be known before data, oracle and run directory are there."""
    from dataclasses import replace

    from uvim_fsq.ablation import is_grid
    from uvim_fsq.config import LMRun
    from uvim_fsq.config_io import dump_yaml, load_run
    from uvim_fsq.config_rules import validate
    from uvim_fsq.models import fill

    if is_grid(Path(args.config)):
        raise UserError(f"{args.config} is a grid; uvim-fsq ablate {args.config} --dry-run prints its cells")
    run = load_run(args.config, args.overrides)
    notes: list[str] = []
    if isinstance(run, LMRun) and not Path(run.oracle).exists():
        notes.append(f"oracle={run.oracle}: no such run yet; task and data, which it decides, are left out")
    else:
        try:
            run = fill(run)
        except UserError as error:
            if isinstance(run, LMRun) or not str(error).startswith("data.root"):
                raise
            notes.append(f"{error}; what only the data can say is left out")
    if not run.train.out:
        notes.append("train.out is empty; training needs a run directory there")
    validate(run if run.train.out else replace(run, train=replace(run.train, out="unnamed")))
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    print(dump_yaml(run), end="")


def command_train(args: argparse.Namespace) -> None:
    """Trains the stage the command names."""
    from uvim_fsq.config_io import load_run
    from uvim_fsq.training.run import train

    run = load_run(args.config, args.overrides)
    if run.stage != args.stage:
        other = "train-oracle" if run.stage == "oracle" else "train-lm"
        raise UserError(f"{args.config} is a configuration of stage {run.stage!r}; use uvim-fsq {other}")
    out = train(run)
    print(f"trained: {out}")


def command_evaluate(args: argparse.Namespace) -> None:
    """Evaluates a run by its task's protocol."""
    from uvim_fsq import processes
    from uvim_fsq.evaluation import evaluate_run
    from uvim_fsq.files import write_json
    from uvim_fsq.results import beside, result_file

    official = Path(args.run) / "official" if args.official else None
    result = evaluate_run(
        args.run,
        args.overrides,
        limit=args.limit,
        csv=args.csv,
        baseline=args.baseline,
        official=official,
        report=args.report,
    )
    if not processes.is_main():
        return
    file = args.json or beside(result_file(Path(args.run)), result["overrides"])
    write_json(file, result)
    print_result(result)
    if result["baseline"]:
        print(f"baseline: {result['baseline']}")
    print(f"written: {file}" + (f", {beside(official, result['overrides'])}/" if official else ""))


def command_analyze(args: argparse.Namespace) -> None:
    """Says what a run's codes are."""
    from uvim_fsq import processes
    from uvim_fsq.analysis import analyze_run

    out = args.out or Path(args.run) / "analysis"
    result = analyze_run(args.run, args.overrides, out=out, limit=args.limit)
    if not processes.is_main():
        return
    print_result(result)
    for way, text in result["ways"].items():
        print(f"{way}: {text}")
    print(f"written: {out / 'report.html'}, {out / 'analysis.json'} and the pictures")


def print_result(result: dict[str, Any]) -> None:
    """The figures of an evaluation as a table, with what they were measured on."""
    from rich.console import Console
    from rich.table import Table

    from uvim_fsq.identity import describe

    figures: dict[str, dict[str, float]] = result["figures"]
    data = ", ".join(f"{key} {value}" for key, value in result["data"].items())
    table = Table(title=f"{result['protocol']} ({data})")
    table.add_column("")
    for way in figures:
        table.add_column(way, justify="right")
    for name in dict.fromkeys(name for way in figures.values() for name in way):
        table.add_row(name, *(f"{way[name]:.4f}" if name in way else "" for way in figures.values()))
    Console().print(table)
    limit = f", first {result['limit']} images only" if result["limit"] else ""
    if result["overrides"]:
        print(describe(result["overrides"]))
    print(f"{result['images']} images{limit}; checkpoint {result['checkpoint']} ({result['checkpoint_sha256'][:12]})")


def command_predict(args: argparse.Namespace) -> None:
    """Predicts pictures."""
    from uvim_fsq.predictor import predict_files

    overrides = [entry for entry in args.inputs if "=" in entry and not Path(entry).exists()]
    inputs = [entry for entry in args.inputs if entry not in overrides]
    if not inputs:
        raise UserError("name at least one image or folder to predict")
    written = predict_files(args.run, inputs, args.out, overrides)
    print(f"{len(written)} predictions written to {args.out}")


def parse_size(text: str) -> int | tuple[int, int]:
    """ "128" or "480x640" (height x width)."""
    try:
        parts = [int(part) for part in text.lower().split("x")]
    except ValueError:
        parts = []
    if len(parts) not in (1, 2) or min(parts, default=0) < 1:
        raise UserError(f"--size {text}: give one number, or HEIGHTxWIDTH")
    return parts[0] if len(parts) == 1 else (parts[0], parts[1])


def command_synth(args: argparse.Namespace) -> None:
    """Writes a synthetic data set."""
    from rich.progress import Progress

    from uvim_fsq.data.synth_writers import write_dataset

    with Progress() as bar:
        task = bar.add_task(f"{args.format} -> {args.out}", total=args.num + args.num_val)
        write_dataset(
            args.format,
            Path(args.out),
            args.num,
            parse_size(args.size),
            seed=args.seed,
            num_val=args.num_val,
            layout=args.layout,
            difficulty=args.difficulty,
            workers=args.workers,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    print(f"{args.num} training and {args.num_val} validation scenes written to {args.out}")


@contextmanager
def _progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on a terminal, nothing elsewhere; yields what is called with (done, total)."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(transient=True, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def command_data_check(args: argparse.Namespace) -> None:
    """Says what lies under a folder and what is wrong with it."""
    from uvim_fsq.data.check import check_data

    with _progress("reading") as update:
        lines, ok = check_data(args.task, args.path, args.overrides, update)
    print("\n".join(lines))
    if not ok:
        raise SystemExit(2)


def command_data_prepare(args: argparse.Namespace) -> None:
    """Caches data in a faster form."""
    from uvim_fsq.config_io import load_run
    from uvim_fsq.models import build_task, complete

    run = complete(load_run({"task": {"name": args.task}, "data": {"root": args.path}}, args.overrides))
    with _progress("preparing") as update:
        said = build_task(run).prepare(args.path, update)
    print(said)


def command_coltran_lists(args: argparse.Namespace) -> None:
    """Writes the two image lists of the ColTran protocol."""
    from uvim_fsq.tasks.imagenet_color.coltran import write_lists

    for path in write_lists(Path(args.out)):
        print(path)


def command_benchmark(args: argparse.Namespace) -> None:
    """Measures speed and prints it beside its floor."""
    from uvim_fsq.benchmark.run import request, run_benchmark

    asked = request(
        args.job, args.config, args.overrides, oracle=args.oracle, batches=tuple(args.batch), repeats=args.repeats
    )
    run_benchmark(
        asked,
        json_file=args.json,
        against=args.against,
        num_operators=args.operators,
        say=lambda text: print(text, flush=True),
    )


def command_ablate(args: argparse.Namespace) -> None:
    """Runs a grid and writes its tables; exit code 1 if a cell failed."""
    from uvim_fsq.ablation import Runner, claim, command_line, finished, plan, prepare, read_grid
    from uvim_fsq.ablation_report import write_results, write_tables

    grid = read_grid(args.grid)
    out = args.out or Path("runs/ablations") / args.grid.stem
    cells = plan(grid, out, args.overrides)
    rows = [row.name for row in grid.rows]
    unknown = [name for name in args.only or [] if name not in rows]
    if unknown:
        raise UserError(f"--only {unknown[0]!r}: no such row; rows: {'; '.join(rows)}")
    chosen = [cell for cell in cells if not args.only or cell.row in args.only]
    if args.dry_run:
        for cell in chosen:
            print(f"{cell.name}{' (finished)' if finished(cell.lm_dir) else ''}")
            print(f"  {command_line(cell.oracle_command)}\n  {command_line(cell.lm_command)}")
        return
    claim(out, grid, args.overrides)
    prepare(grid, out, print)
    runner = Runner(
        out,
        args.jobs,
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
    print(f"report: {out / 'report.html'}   table: {out / 'table.md'}   figures: {out / 'results.json'}")


def command_import(args: argparse.Namespace) -> None:
    """Imports a published checkpoint."""
    from uvim_fsq.importing import import_lm, import_oracle

    if args.stage == "oracle":
        if not args.task:
            raise UserError("stage I needs --task depth, panoptic or color")
        out = import_oracle(args.file, args.task, args.out, args.overrides)
    else:
        if args.oracle is None:
            raise UserError("stage II needs --oracle, the run directory of its stage I")
        out = import_lm(args.file, args.oracle, args.out, args.overrides)
    print(f"imported: {out}")


def command_quickstart(args: argparse.Namespace) -> None:
    """Runs the whole pipeline on synthetic scenes."""
    from uvim_fsq.quickstart import quickstart

    out = args.out or f"runs/quickstart{'' if args.task == 'nyu_depth' else '_' + args.task}"
    quickstart(Path(out), args.gpu_scale, args.task)
