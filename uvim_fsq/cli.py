"""The command line: what may be typed. A user's mistake is one line with the remedy and exit code 2."""

from __future__ import annotations

import argparse
import errno
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from uvim_fsq import commands as do
from uvim_fsq.errors import UserError
from uvim_fsq.plugins import trusting
from uvim_fsq.progress import clear
from uvim_fsq.training.signals import ended_by_sigterm

#: Commands that read a trained run, or may (an oracle's, one to resume).
READ_RUNS = (
    "train-oracle",
    "train-lm",
    "config",
    "evaluate",
    "analyze",
    "predict",
    "ablate",
    "import-uvim",
    "benchmark",
    "quickstart",
)


def _config_epilog(stage: str) -> str:
    from uvim_fsq.config import LMRun, OracleRun
    from uvim_fsq.config_io import describe_keys

    lines = ["keys (key=value on the command line, nested in the YAML):", ""]
    for key, kind, default, doc in describe_keys(OracleRun if stage == "oracle" else LMRun):
        lines += [f"  {key}  [{kind}; default {default}]", f"      {doc}"]
    return "\n".join([*lines, "", "the keys of each task under task.:", *_task_keys()])


def _task_keys() -> list[str]:
    from uvim_fsq.config_io import describe_keys
    from uvim_fsq.tasks.registry import config_class, task_names

    lines: list[str] = []
    for name in task_names():
        lines.append(f"  task.name={name}")
        for key, kind, default, doc in describe_keys(config_class(name), "task."):
            lines += [f"    {key}  [{kind}; default {default}]", f"        {doc}"]
    return lines


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
    parser.set_defaults(command=do.command_train, stage=stage)


def _add_training(commands: Any, asked: Callable[[str], bool]) -> None:
    for name, stage, text in (
        ("train-oracle", "oracle", "stage I: train a task's oracle"),
        ("train-lm", "lm", "stage II: train the language model on a frozen oracle"),
    ):
        _add_train(commands, name, stage, text, asked(name))
    sub = _add_keyed(commands, "config", "lm", "print the resolved configuration", asked("config"))
    sub.add_argument("config")
    sub.add_argument("overrides", nargs="*", metavar="key=value")
    sub.set_defaults(command=do.command_config)


def _add_use(commands: Any, asked: Callable[[str], bool]) -> None:
    sub = _add_keyed(commands, "evaluate", "lm", "evaluate a run by its task's protocol", asked("evaluate"))
    sub.add_argument("run", help="run or checkpoint directory")
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. task.protocol=eigen data.root=...")
    sub.add_argument("--limit", type=int, help="first N images only")
    sub.add_argument("--csv", type=Path, help="write each image's figures to this file")
    sub.add_argument("--json", type=Path, help="default: RUN/evaluation.json; with other settings beside it")
    sub.add_argument("--baseline", action="store_true", help="also the trivial baseline, from the training split")
    sub.add_argument("--report", type=Path, help="write an HTML page with figures, panels and curves to this file")
    sub.add_argument("--official", action="store_true", help="also the benchmark's own result files and scores")
    sub.set_defaults(command=do.command_evaluate)

    text = "what a run's codes are, and how much its predictions hang on them"
    sub = _add_keyed(commands, "analyze", "lm", text, asked("analyze"))
    sub.add_argument("run", help="run or checkpoint directory of either stage")
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. eval.seed=1 data.eval_split=train")
    sub.add_argument("--out", type=Path, help="folder for analysis.json, report.html, pictures (default: RUN/analysis)")
    sub.add_argument("--limit", type=int, help="first N images only")
    sub.set_defaults(command=do.command_analyze)

    sub = _add_keyed(commands, "predict", "lm", "predict pictures with a trained LM", asked("predict"))
    sub.add_argument("run", help="run or checkpoint directory of an LM")
    sub.add_argument("inputs", nargs="+", metavar="IMAGE|FOLDER|key=value")
    sub.add_argument("--out", required=True, help="folder for the results")
    sub.set_defaults(command=do.command_predict)


def _add_data(commands: Any) -> None:
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
    sub.set_defaults(command=do.command_synth)

    data = commands.add_parser("data", help="look after data sets").add_subparsers(required=True, metavar="ACTION")
    for name, text, command in (
        ("check", "say which layout a folder has, count, find what is broken", do.command_data_check),
        ("prepare", "cache a data set in a form that loads faster", do.command_data_prepare),
    ):
        sub = data.add_parser(name, help=text, description=text)
        sub.add_argument("path")
        sub.add_argument("--task", required=True, help="whose data: nyu_depth, coco_panoptic, imagenet_color, ...")
        sub.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. task.image_dir=... plugins=[...]")
        sub.set_defaults(command=command)
    sub = data.add_parser("coltran-lists", help="write the image lists of the ColTran FID protocol")
    sub.add_argument("--out", required=True, help="folder for the two lists")
    sub.set_defaults(command=do.command_coltran_lists)


def _add_comparisons(commands: Any) -> None:
    text = "train and compare a grid of configurations x seeds"
    sub = commands.add_parser("ablate", help=text, description=text)
    sub.add_argument("grid", type=Path, help="a grid file, e.g. configs/ablations/table2_depth-small.yaml")
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="settings of all cells, both stages")
    sub.add_argument("--out", type=Path, help="default: runs/ablations/GRID")
    sub.add_argument("--only", action="append", metavar="ROW", help="these rows only; may be given several times")
    sub.add_argument("--jobs", type=int, help="cells at a time (default: one per GPU, or one)")
    sub.add_argument("--dry-run", action="store_true", help="print cells and commands, do nothing")
    sub.set_defaults(command=do.command_ablate)

    text = "turn a published UViM checkpoint (.npz) into a run directory"
    sub = commands.add_parser("import-uvim", help=text, description=text)
    sub.add_argument("file", type=Path)
    sub.add_argument("--stage", default="oracle", choices=("oracle", "lm"), help="stage I (default) or II")
    sub.add_argument("--task", help="of stage I: depth, panoptic (needs data.root= for its categories) or color")
    sub.add_argument("--oracle", type=Path, help="of stage II: the run directory of the imported stage I")
    sub.add_argument("--out", required=True, type=Path, help="new run directory")
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. data.root=coco eval.batch_size=8")
    sub.set_defaults(command=do.command_import)


def _add_benchmark(commands: Any) -> None:
    text = "how fast training, decoding, loading and the metrics are, beside what the machine allows"
    sub = commands.add_parser("benchmark", help=text, description=text)
    jobs = ("train-oracle", "train-lm", "decode", "side-by-side", "loader", "metrics", "all")
    sub.add_argument("job", choices=jobs)
    sub.add_argument("config", type=Path, nargs="?", help="of either stage, e.g. configs/nyu_depth/quickstart_lm.yaml")
    sub.add_argument("overrides", nargs="*", metavar="key=value")
    sub.add_argument("--oracle", type=Path, help="configuration of an LM's oracle (default: the one beside it)")
    sub.add_argument("--batch", type=int, nargs="+", default=[], help="batch sizes of decoding; of training the first")
    sub.add_argument("--repeats", type=int, default=5, help="timed repeats; their median is printed (default 5)")
    sub.add_argument("--json", type=Path, help="write everything measured to this file")
    sub.add_argument("--against", type=Path, metavar="FILE", help="compare with an earlier run's --json")
    sub.add_argument("--operators", type=int, default=0, metavar="N", help="also the N operators that take most time")
    sub.set_defaults(command=do.command_benchmark)


def build_parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """All commands. `argv` decides whether the long list of keys is worth making."""
    parser = argparse.ArgumentParser(prog="uvim-fsq", description="Dense prediction by discrete tokens.")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def asked(name: str) -> bool:
        return name in argv and ("-h" in argv or "--help" in argv)

    _add_training(commands, asked)
    _add_use(commands, asked)
    _add_data(commands)
    _add_comparisons(commands)
    _add_benchmark(commands)
    sub = commands.add_parser("quickstart", help="make data, train both stages, evaluate, draw a report")
    sub.add_argument("--task", default="nyu_depth", help="nyu_depth (default), coco_panoptic or imagenet_color")
    sub.add_argument("--out", help="default: runs/quickstart, for other tasks runs/quickstart_TASK")
    sub.add_argument("--gpu-scale", action="store_true", help="the same job bigger, on a GPU")
    sub.set_defaults(command=do.command_quickstart)
    for name in READ_RUNS:
        text = "import the plugins that a run names, whoever made it (as does UVIM_FSQ_TRUST=1)"
        commands.choices[name].add_argument("--trust", action="store_true", help=text)
    return parser


def _one_line_warning(message: Warning | str, category: type[Warning], *place: Any, **line: Any) -> str:
    """What the package warns of is meant for the user, who does not care where it was raised."""
    clear()
    return f"warning: {message}\n" if category is UserWarning else _PLAIN_WARNING(message, category, *place, **line)


_PLAIN_WARNING = warnings.formatwarning


#: What several processes can share; all else would be done once by each of them, into the same files.
_SHARED_COMMANDS = (do.command_train, do.command_evaluate, do.command_analyze)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `uvim-fsq` and `python -m uvim_fsq`."""
    try:
        with ended_by_sigterm():
            _main(argv)
            if "uvim_fsq.processes" in sys.modules:  # it takes seconds to import
                sys.modules["uvim_fsq.processes"].part()
    except BaseException as error:
        if "uvim_fsq.processes" in sys.modules:
            sys.modules["uvim_fsq.processes"].end_at_once(error)
        raise


def _several() -> bool:
    return (os.environ.get("WORLD_SIZE") or "1") != "1"


def _main(argv: Sequence[str] | None) -> None:
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
    try:
        if _several() and args.command not in _SHARED_COMMANDS:
            raise UserError(f"this command runs in one process, not in {os.environ['WORLD_SIZE']}: start no launcher")
        with trusting(getattr(args, "trust", False)):
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
