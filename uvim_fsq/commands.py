"""What each command of `uvim-fsq` does: thin functions of the parsed arguments over the package."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uvim_fsq.errors import UserError
from uvim_fsq.files import check_file, check_folder, inside, refuse_links, write_json
from uvim_fsq.progress import Bar, is_first, say

if TYPE_CHECKING:
    from uvim_fsq.config import Run

#: Failures that are named one by one; the rest are counted.
SHOWN = 20

# Heavy imports stay inside the commands, after what can be refused without them, so that --help and a misspelt key are
# answered at once.


def command_config(args: argparse.Namespace) -> None:
    """Prints the resolved configuration, as far as it can be known before data, oracle and run directory are there."""
    from dataclasses import replace

    from uvim_fsq.ablation import is_grid
    from uvim_fsq.config import OracleRun
    from uvim_fsq.config_io import dump_yaml, load_run
    from uvim_fsq.config_rules import validate
    from uvim_fsq.models import complete
    from uvim_fsq.run_dirs import inherit

    if is_grid(Path(args.config)):
        raise UserError(f"{args.config} is a grid; uvim-fsq ablate {args.config} --dry-run prints its cells")
    run = load_run(args.config, args.overrides)
    out, notes = run.train.out, list[str]()
    run = replace(run, train=replace(run.train, out=out or "unnamed"))
    if isinstance(run, OracleRun):
        validate(run)
        try:
            run = complete(run)
        except UserError as error:
            if not str(error).startswith("data.root"):
                raise
            notes.append(f"{error}; what only the data can say is left out")
    elif Path(run.oracle).exists():
        run = inherit(run)
    else:
        validate(run)
        notes.append(f"oracle={run.oracle}: no such run yet; task and data, which it decides, are left out")
    if not out:
        notes.append("train.out is empty; training needs a run directory there")
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    print(dump_yaml(replace(run, train=replace(run.train, out=out))), end="")


def command_train(args: argparse.Namespace) -> None:
    """Trains the stage the command names."""
    from uvim_fsq.config_io import find_data_root, load_run
    from uvim_fsq.run_dirs import inherit, resume_from
    from uvim_fsq.tasks.registry import BUILT_IN

    run = load_run(args.config, args.overrides)
    if run.stage != args.stage:
        other = "train-oracle" if run.stage == "oracle" else "train-lm"
        raise UserError(f"{args.config} is a configuration of stage {run.stage!r}; use uvim-fsq {other}")
    whole = inherit(run)
    _check_places(folders=[run.train.out])
    if is_first():
        resume_from(Path(run.train.out), run.train.resume)
    if whole.task is not None and whole.task.name in BUILT_IN:
        find_data_root(whole.data.root)
    say(f"{args.config}: loading ...")

    from uvim_fsq.training.run import train

    out = train(run)
    say(f"trained: {out}")
    if run.stage == "oracle":
        say(f"next: uvim-fsq train-lm {_lm_config(args.config)} oracle={out} train.out=...")
    else:
        _say_next_of_lm(out)


def _lm_config(oracle_config: str) -> str:
    """The configuration beside an oracle's that goes with it, e.g. lm.yaml or quickstart_lm.yaml."""
    path = Path(oracle_config)
    beside = path.with_name(path.name.replace("oracle", "lm"))
    return str(beside) if beside != path and beside.is_file() else "LM_CONFIG.yaml"


def _say_next_of_lm(run: str | Path) -> None:
    say(f"next: uvim-fsq predict {run} PHOTOS --out predictions, or uvim-fsq evaluate {run} --report report.html")


def _check_places(files: Sequence[Path | None] = (), folders: Sequence[str | Path] = ()) -> None:
    """Refuses places that cannot be written before there is anything to write."""
    if is_first():
        for file in filter(None, files):
            check_file(file)
        for folder in folders:
            check_folder(Path(folder))


def _check_run(run: str | Path, overrides: Sequence[str]) -> dict[str, list[Any]]:
    """Refuses what a user may mistype about a trained run before torch is imported.

    Returns the settings that differ from the trained ones (`identity.check_overrides`).
    """
    from uvim_fsq.run_dirs import read_overridden, resolve_checkpoint

    changed = read_overridden(resolve_checkpoint(run), overrides)[1]
    say(f"{run}: loading ...")
    return changed


def command_evaluate(args: argparse.Namespace) -> None:
    """Evaluates a run by its task's protocol."""
    from uvim_fsq.results import beside, result_file

    limited = [f"eval.limit={args.limit}"] if args.limit is not None else []
    changed = _check_run(args.run, [*args.overrides, *limited])
    # The result of a part, and its official files, must not take the place of the whole.
    official = beside(Path(args.run) / "official", changed) if args.official else None
    if official:
        inside(Path(args.run), official / "oracle")
        refuse_links(official)
    file = args.json or beside(result_file(Path(args.run)), changed)
    _check_places([file, args.csv, args.report], [official] if official else [])

    from uvim_fsq import processes
    from uvim_fsq.evaluation import evaluate_run

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
    write_json(file, result)
    print_result(result)
    if result["baseline"]:
        print(f"baseline: {result['baseline']}")
    print(f"written: {file}" + (f", {official}/" if official else ""))
    if "lm" in result["figures"]:
        say(f"next: uvim-fsq predict {args.run} PHOTOS --out predictions")
    else:
        say(f"next: uvim-fsq train-lm LM_CONFIG.yaml oracle={args.run} train.out=...")


def command_analyze(args: argparse.Namespace) -> None:
    """Says what a run's codes are."""
    out = args.out or Path(args.run) / "analysis"
    _check_run(args.run, args.overrides)
    if args.out is None:
        inside(Path(args.run), out / "analysis.json")
    _check_places(folders=[out])

    from uvim_fsq import processes
    from uvim_fsq.analysis import analyze_run

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
    overrides = [entry for entry in args.inputs if "=" in entry and not Path(entry).exists()]
    inputs = [entry for entry in args.inputs if entry not in overrides]
    if not inputs:
        raise UserError("name at least one image or folder to predict")
    from uvim_fsq.data.folders import list_images

    list_images(inputs)
    _check_run(args.run, overrides)
    _check_places(folders=[args.out])

    from uvim_fsq.prediction_folder import INDEX
    from uvim_fsq.predictor import predict_files

    entries = predict_files(args.run, inputs, args.out, overrides)
    errors = [entry["error"] for entry in entries if "error" in entry]
    done = len(entries) - len(errors)
    say(f"{done} of {len(entries)} pictures predicted into {args.out}, listed in {Path(args.out) / INDEX}")
    if errors:
        for error in errors[:SHOWN]:
            print(f"failed: {' '.join(error.split())}", file=sys.stderr)
        more = f", {len(errors) - SHOWN} of them not shown" if len(errors) > SHOWN else ""
        raise UserError(f"{len(errors)} of {len(entries)} pictures could not be predicted{more}; the index names all")


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
    size = parse_size(args.size)
    _check_places(folders=[args.out])

    from uvim_fsq.data.synth_writers import write_dataset

    with Bar(args.out) as bar:
        write_dataset(
            args.format,
            Path(args.out),
            args.num,
            size,
            seed=args.seed,
            num_val=args.num_val,
            layout=args.layout,
            difficulty=args.difficulty,
            workers=args.workers,
            progress=bar.update,
        )
    say(f"{args.num} training and {args.num_val} validation scenes written to {args.out}")
    task = {"nyu": "nyu_depth", "coco_panoptic": "coco_panoptic", "imagenet": "imagenet_color"}[args.format]
    _say_next_of_data(task, args.out)


def command_data_check(args: argparse.Namespace) -> None:
    """Says what lies under a folder and what is wrong with it."""
    _read_data_config(args)

    from uvim_fsq.data.check import check_data

    with Bar(f"{args.path}: reading") as bar:
        lines, ok = check_data(args.task, args.path, args.overrides, bar.update)
    say("\n".join(lines))
    if not ok:
        raise SystemExit(2)
    _say_next_of_data(args.task, args.path)


def _read_data_config(args: argparse.Namespace) -> Run:
    from uvim_fsq.config_io import load_run

    return load_run({"task": {"name": args.task}, "data": {"root": args.path}}, args.overrides)


def _say_next_of_data(task: str, root: str) -> None:
    from uvim_fsq.tasks.registry import BUILT_IN

    config = f"configs/{task}/oracle.yaml" if task in BUILT_IN else "ORACLE_CONFIG.yaml"
    say(f"next: uvim-fsq train-oracle {config} data.root={root} train.out=...")


def command_data_prepare(args: argparse.Namespace) -> None:
    """Caches data in a faster form."""
    run = _read_data_config(args)

    from uvim_fsq.models import build_task, complete

    with Bar(f"{args.path}: preparing") as bar:
        said = build_task(complete(run)).prepare(args.path, bar.update)
    say(said)
    _say_next_of_data(args.task, args.path)


def command_coltran_lists(args: argparse.Namespace) -> None:
    """Writes the two image lists of the ColTran protocol."""
    _check_places(folders=[args.out])

    from uvim_fsq.tasks.imagenet_color.coltran import write_lists

    for path in write_lists(Path(args.out)):
        print(path)


def command_benchmark(args: argparse.Namespace) -> None:
    """Measures speed and prints it beside its floor."""
    _check_places([args.json])

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
    from uvim_fsq.ablation import Runner, claim, command_line, plan, prepare, read_grid
    from uvim_fsq.ablation_devices import find_devices, fit_cells
    from uvim_fsq.ablation_report import write_results, write_tables
    from uvim_fsq.results import finished

    grid = read_grid(args.grid)
    out = args.out or Path("runs/ablations") / args.grid.stem
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
        for cell in chosen:
            print(f"{cell.name}{' (finished)' if finished(cell.lm_dir) else ''}")
            print(f"  {command_line(cell.oracle_command)}\n  {command_line(cell.lm_command)}")
        return
    _check_places(folders=[out])
    claim(out, grid, args.overrides)
    prepare(grid, out, print)
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
    print(f"report: {out / 'report.html'}   table: {out / 'table.md'}   figures: {out / 'results.json'}")


def command_import(args: argparse.Namespace) -> None:
    """Imports a published checkpoint."""
    _check_places(folders=[args.out])

    from uvim_fsq.importing import import_lm, import_oracle

    if args.stage == "oracle":
        if not args.task:
            raise UserError("stage I needs --task depth, panoptic or color")
        out = import_oracle(args.file, args.task, args.out, args.overrides)
    else:
        if args.oracle is None:
            raise UserError("stage II needs --oracle, the run directory of its stage I")
        out = import_lm(args.file, args.oracle, args.out, args.overrides)
    say(f"imported: {out}")
    if args.stage == "oracle":
        say(f"next: uvim-fsq evaluate {out}, or uvim-fsq import-uvim LM.npz --stage lm --oracle {out} --out ...")
    else:
        _say_next_of_lm(out)


def command_quickstart(args: argparse.Namespace) -> None:
    """Runs the whole pipeline on synthetic scenes."""
    out = args.out or f"runs/quickstart{'' if args.task == 'nyu_depth' else '_' + args.task}"
    from uvim_fsq.tasks.registry import config_class

    config_class(args.task)
    _check_places(folders=[out])
    say(f"{out}: loading ...")

    from uvim_fsq.quickstart import quickstart

    quickstart(Path(out), args.gpu_scale, args.task)
    _say_next_of_lm(Path(out) / "lm")
