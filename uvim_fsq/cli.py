"""The command line: thin commands over the package. A user's mistake is one line with the remedy and exit code 2."""

from __future__ import annotations

import argparse
import errno
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from uvim_fsq.errors import UserError

# Heavy imports stay inside the commands, so that --help answers at once.


def _config_epilog(stage: str) -> str:
    from uvim_fsq.config import LMRun, OracleRun
    from uvim_fsq.config_io import describe_keys

    lines = ["keys (key=value on the command line, nested in the YAML):", ""]
    for key, kind, default, doc in describe_keys(OracleRun if stage == "oracle" else LMRun):
        lines += [f"  {key}  [{kind}; default {default}]", f"      {doc}"]
    return "\n".join([*lines, "", "the keys of each task under task.:", *_task_keys()])


def _task_keys() -> list[str]:
    from uvim_fsq.config_io import describe_keys
    from uvim_fsq.tasks.registry import load_plugins, task_class, task_names

    load_plugins(())
    lines: list[str] = []
    for name in task_names():
        lines.append(f"  task.name={name}")
        for key, kind, default, doc in describe_keys(task_class(name).Config, "task."):
            lines += [f"    {key}  [{kind}; default {default}]", f"        {doc}"]
    return lines


def command_config(args: argparse.Namespace) -> None:
    """Prints the resolved configuration."""
    from uvim_fsq.config import OracleRun
    from uvim_fsq.config_io import dump_yaml, load_run
    from uvim_fsq.config_rules import validate
    from uvim_fsq.models import resolve

    run = load_run(args.config, args.overrides)
    try:
        run = resolve(run)
    except UserError as error:
        # A configuration can be read before its data are there.
        if not isinstance(run, OracleRun) or not str(error).startswith("data.root"):
            raise
        validate(run)
        print(f"note: {error}; what only the data can say is left out", file=sys.stderr)
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
    from accelerate.state import PartialState

    from uvim_fsq.evaluation import evaluate_run

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
    if not PartialState().is_main_process:
        return
    file = args.json or Path(args.run) / "evaluation.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=2) + "\n")
    print_result(result)
    if result["baseline"]:
        print(f"baseline: {result['baseline']}")
    print(f"written: {file}" + (f", {official}/" if official else ""))


def command_analyze(args: argparse.Namespace) -> None:
    """Says what a run's codes are."""
    from accelerate.state import PartialState

    from uvim_fsq.analysis import analyze_run

    out = args.out or Path(args.run) / "analysis"
    result = analyze_run(args.run, args.overrides, out=out, limit=args.limit)
    if not PartialState().is_main_process:
        return
    print_result(result)
    for way, text in result["ways"].items():
        print(f"{way}: {text}")
    print(f"written: {out / 'report.html'}, {out / 'analysis.json'} and the pictures")


def print_result(result: dict[str, Any]) -> None:
    """The figures of an evaluation as a table, with what they were measured on."""
    from rich.console import Console
    from rich.table import Table

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


def _one_line_warning(message: Warning | str, category: type[Warning], *place: Any, **line: Any) -> str:
    """What the package warns of is meant for the user, who does not care where it was raised."""
    return f"warning: {message}\n" if category is UserWarning else _PLAIN_WARNING(message, category, *place, **line)


_PLAIN_WARNING = warnings.formatwarning


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
    """Caches labels in a faster form."""
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


def command_ablate(args: argparse.Namespace) -> None:
    """Runs a grid and writes its tables; exit code 1 if a cell failed."""
    from uvim_fsq.ablation import Runner, claim, command_line, finished, plan, prepare, read_grid
    from uvim_fsq.ablation_report import write_results

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
    runner = Runner(out, args.jobs, lambda line: print(line, flush=True))
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


def _add_keyed(commands: Any, name: str, stage: str, text: str, wants_help: bool) -> argparse.ArgumentParser:
    """A command whose --help lists the configuration keys; the list is made only when it is asked for."""
    return commands.add_parser(
        name,
        help=text,
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_config_epilog(stage) if wants_help else None,
    )


def _add_train(commands: Any, name: str, stage: str, text: str, wants_help: bool) -> None:
    parser = _add_keyed(commands, name, stage, text, wants_help)
    parser.add_argument("config", help="a YAML file, e.g. configs/nyu_depth/oracle.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace those of the file")
    parser.set_defaults(command=command_train, stage=stage)


def build_parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """All commands. `argv` decides whether the long list of keys is worth making."""
    parser = argparse.ArgumentParser(prog="uvim-fsq", description="Dense prediction by discrete tokens.")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    asked = "-h" in argv or "--help" in argv
    for name, stage, text in (
        ("train-oracle", "oracle", "stage I: train a task's oracle"),
        ("train-lm", "lm", "stage II: train the language model on a frozen oracle"),
    ):
        _add_train(commands, name, stage, text, asked and name in argv)
    sub = _add_keyed(commands, "config", "lm", "print the resolved configuration", asked and "config" in argv)
    sub.add_argument("config")
    sub.add_argument("overrides", nargs="*", metavar="key=value")
    sub.set_defaults(command=command_config)

    sub = _add_keyed(commands, "evaluate", "lm", "evaluate a run by its task's protocol", asked and "evaluate" in argv)
    sub.add_argument("run", help="run or checkpoint directory")
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. task.protocol=eigen data.root=...")
    sub.add_argument("--limit", type=int, help="first N images only")
    sub.add_argument("--csv", type=Path, help="write each image's figures to this file")
    sub.add_argument("--json", type=Path, help="result file (default: RUN/evaluation.json)")
    sub.add_argument("--baseline", action="store_true", help="also the trivial baseline, from the training split")
    sub.add_argument("--report", type=Path, help="write an HTML page with figures, panels and curves to this file")
    sub.add_argument("--official", action="store_true", help="also the benchmark's own result files and scores")
    sub.set_defaults(command=command_evaluate)

    text = "what a run's codes are, and how much its predictions hang on them"
    sub = _add_keyed(commands, "analyze", "lm", text, asked and "analyze" in argv)
    sub.add_argument("run", help="run or checkpoint directory of either stage")
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. eval.seed=1 data.eval_split=train")
    sub.add_argument("--out", type=Path, help="folder for analysis.json, report.html, pictures (default: RUN/analysis)")
    sub.add_argument("--limit", type=int, help="first N images only")
    sub.set_defaults(command=command_analyze)

    sub = _add_keyed(commands, "predict", "lm", "predict pictures with a trained LM", asked and "predict" in argv)
    sub.add_argument("run", help="run or checkpoint directory of an LM")
    sub.add_argument("inputs", nargs="+", metavar="IMAGE|FOLDER|key=value")
    sub.add_argument("--out", required=True, help="folder for the results")
    sub.set_defaults(command=command_predict)

    sub = commands.add_parser("synth", help="write a synthetic data set in a real on-disk format")
    sub.add_argument("--format", required=True, choices=("nyu", "coco_panoptic", "imagenet"))
    sub.add_argument("--num", type=int, required=True, help="training scenes")
    sub.add_argument("--num-val", type=int, default=100, help="validation scenes (default 100)")
    sub.add_argument("--size", default="128", help="side in pixels, or HEIGHTxWIDTH (default 128)")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--out", required=True, help="new folder")
    sub.add_argument("--layout", default="h5", choices=("h5", "mat", "png"), help="of --format nyu (default h5)")
    sub.add_argument("--difficulty", default="varied", choices=("varied", "plain"))
    sub.add_argument("--workers", type=int, default=None, help="processes (default: all cores)")
    sub.set_defaults(command=command_synth)

    data = commands.add_parser("data", help="look after data sets").add_subparsers(required=True, metavar="ACTION")
    for name, text, command in (
        ("check", "say which layout a folder has, count, find what is broken", command_data_check),
        ("prepare", "cache labels in a form that loads faster", command_data_prepare),
    ):
        sub = data.add_parser(name, help=text, description=text)
        sub.add_argument("path")
        sub.add_argument("--task", required=True, help="whose data: nyu_depth, coco_panoptic, imagenet_color, ...")
        sub.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. task.image_dir=... plugins=[...]")
        sub.set_defaults(command=command)
    sub = data.add_parser("coltran-lists", help="write the image lists of the ColTran FID protocol")
    sub.add_argument("--out", required=True, help="folder for the two lists")
    sub.set_defaults(command=command_coltran_lists)

    text = "train and compare a grid of configurations x seeds"
    sub = commands.add_parser("ablate", help=text, description=text)
    sub.add_argument("grid", type=Path, help="a grid file, e.g. configs/ablations/table2_depth-small.yaml")
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="settings of all cells, both stages")
    sub.add_argument("--out", type=Path, help="default: runs/ablations/GRID")
    sub.add_argument("--only", action="append", metavar="ROW", help="these rows only; may be given several times")
    sub.add_argument("--jobs", type=int, help="cells at a time (default: one per GPU, or one)")
    sub.add_argument("--dry-run", action="store_true", help="print cells and commands, do nothing")
    sub.set_defaults(command=command_ablate)

    text = "turn a published UViM checkpoint (.npz) into a run directory"
    sub = commands.add_parser("import-uvim", help=text, description=text)
    sub.add_argument("file", type=Path)
    sub.add_argument("--stage", default="oracle", choices=("oracle", "lm"), help="stage I (default) or II")
    sub.add_argument("--task", help="of stage I: depth, panoptic (needs data.root= for its categories) or color")
    sub.add_argument("--oracle", type=Path, help="of stage II: the run directory of the imported stage I")
    sub.add_argument("--out", required=True, type=Path, help="new run directory")
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. data.root=coco eval.batch_size=8")
    sub.set_defaults(command=command_import)

    sub = commands.add_parser("quickstart", help="make data, train both stages, evaluate, draw a report")
    sub.add_argument("--task", default="nyu_depth", help="nyu_depth (default), coco_panoptic or imagenet_color")
    sub.add_argument("--out", help="default: runs/quickstart, for other tasks runs/quickstart_TASK")
    sub.add_argument("--gpu-scale", action="store_true", help="the same job bigger, on a GPU")
    sub.set_defaults(command=command_quickstart)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `uvim-fsq` and `python -m uvim_fsq`."""
    argv = list(sys.argv[1:] if argv is None else argv)
    # --debug may stand anywhere.
    debug = "--debug" in argv
    argv = [arg for arg in argv if arg != "--debug"]
    parser = build_parser(argv)
    # argparse takes positionals in one run only; key=value may also stand behind options.
    args, late = parser.parse_known_args(argv)
    target = getattr(args, "overrides", getattr(args, "inputs", None))
    if late and (target is None or any(arg.startswith("-") or "=" not in arg for arg in late)):
        parser.error(f"unrecognized arguments: {' '.join(late)}")
    if target is not None:
        target += late
    warnings.formatwarning = _one_line_warning
    # Plugins may lie beside the configuration.
    sys.path.insert(0, os.getcwd())
    try:
        args.command(args)
    except UserError as error:
        if debug:
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except OSError as error:
        if debug or error.errno not in (errno.ENOSPC, errno.EACCES, errno.EROFS):
            raise
        where = f" ({error.filename})" if error.filename else ""
        print(f"error: {error.strerror}{where}; free space or choose another folder", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
