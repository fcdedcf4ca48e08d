"""The argument parser and the entry points. A user error is one line with a remedy and exit code 2."""

from __future__ import annotations

import argparse
import errno
import io
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from uvim_fsq.commands import (
    ablate,
    analyze,
    benchmark,
    coltran_lists,
    compile,
    completion,
    config,
    data_check,
    data_convert,
    data_prepare,
    data_view,
    demo,
    doctor,
    evaluate,
    export,
    import_uvim,
    plan,
    predict,
    push,
    quickstart,
    runs,
    synth,
    train_direct,
    train_lm,
    train_oracle,
    tune,
    tune_decoder,
)
from uvim_fsq.config.plugins import trusting
from uvim_fsq.console import clear
from uvim_fsq.errors import UserError
from uvim_fsq.training.signals import ended_by_sigterm
from uvim_fsq.version import __version__

COMMANDS: dict[str, ModuleType] = {
    "quickstart": quickstart,
    "train-oracle": train_oracle,
    "train-lm": train_lm,
    "train-direct": train_direct,
    "config": config,
    "evaluate": evaluate,
    "tune": tune,
    "tune-decoder": tune_decoder,
    "analyze": analyze,
    "predict": predict,
    "demo": demo,
    "push": push,
    "compile": compile,
    "export": export,
    "synth": synth,
    "ablate": ablate,
    "import-uvim": import_uvim,
    "benchmark": benchmark,
    "plan": plan,
    "runs": runs,
    "doctor": doctor,
    "completion": completion,
}
DATA_COMMANDS: dict[str, ModuleType] = {
    "check": data_check,
    "view": data_view,
    "prepare": data_prepare,
    "convert": data_convert,
    "coltran-lists": coltran_lists,
}
#: Command -> the stage whose configuration keys its --help lists.
LISTS_KEYS = {
    "train-oracle": "oracle",
    "train-direct": "direct",
    **dict.fromkeys(
        ("train-lm", "config", "evaluate", "tune", "tune-decoder", "analyze", "predict", "demo", "compile"), "lm"
    ),
    "export": "lm",
}
#: Commands that do not read run directories and therefore never import the plugins that a run names.
READS_NO_RUN = ("synth", "runs", "doctor", "completion")
#: Commands that can run in several processes. With any other, each process would write the same files.
SHARED = (train_oracle, train_lm, train_direct, evaluate, tune, tune_decoder, analyze)


def _config_epilog(stage: str) -> str:
    from uvim_fsq.config.parse import describe_keys
    from uvim_fsq.config.schema import STAGES

    lines = ["configuration keys (key=value on the command line, nested in YAML files):", ""]
    for key, kind, default, doc in describe_keys(STAGES[stage]):
        lines += [f"  {key}  [{kind}; {_default(default)}]", f"      {doc}"]
    return "\n".join([*lines, "", "keys of each task, under task.:", *_task_keys()])


def _default(value: str) -> str:
    return "required" if value == "required" else f"default {value or '(empty)'}"


def _task_keys() -> list[str]:
    from uvim_fsq.config.parse import describe_keys
    from uvim_fsq.tasks.registry import config_class, task_names

    lines: list[str] = []
    for name in task_names():
        lines.append(f"  task.name={name}")
        for key, kind, default, doc in describe_keys(config_class(name), "task."):
            lines += [f"    {key}  [{kind}; {_default(default)}]", f"        {doc}"]
    return lines


def _add_debug(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _add_command(parser: argparse.ArgumentParser, name: str, argv: Sequence[str]) -> None:
    """Adds the arguments of a command, and with --help its configuration keys, which take long to list."""
    command = COMMANDS[name]
    command.add_arguments(parser)
    parser.set_defaults(command=command)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    if name not in READS_NO_RUN:
        text = "import the plugins that a run names, whoever made the run (like UVIM_FSQ_TRUST=1)"
        parser.add_argument("--trust", action="store_true", help=text)
    if name in LISTS_KEYS and ("-h" in argv or "--help" in argv):
        parser.epilog = _config_epilog(LISTS_KEYS[name])


def build_parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of `uvim-fsq`. The keys of a command are listed only if `argv` asks for its help."""
    parser = argparse.ArgumentParser(prog="uvim-fsq", description="Dense prediction with discrete tokens.")
    _add_debug(parser)
    parser.add_argument("--version", action="version", version=f"uvim-fsq {__version__}")
    parsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        sub = parsers.add_parser(name, help=command.HELP, description=command.HELP)
        _add_command(sub, name, argv if name in argv else ())
        if command is completion:
            sub.set_defaults(parser=parser, stages=LISTS_KEYS)
    data = parsers.add_parser("data", help="check, prepare and convert data sets")
    actions = data.add_subparsers(required=True, metavar="ACTION")
    for name, command in DATA_COMMANDS.items():
        sub = actions.add_parser(name, help=command.HELP, description=command.HELP)
        command.add_arguments(sub)
        sub.set_defaults(command=command)
    return parser


def script_parser(name: str, argv: Sequence[str], program: str, description: str) -> argparse.ArgumentParser:
    """The parser of a script that runs a single command, with the arguments of only this command."""
    parser = argparse.ArgumentParser(prog=program, description=description)
    _add_debug(parser)
    _add_command(parser, name, argv)
    return parser


def _one_line_warning(message: Warning | str, category: type[Warning], *place: Any, **line: Any) -> str:
    """Formats the package's own warnings, which are meant for users, without the line of code that issued them."""
    clear()
    return f"warning: {message}\n" if category is UserWarning else _DEFAULT_FORMAT(message, category, *place, **line)


_DEFAULT_FORMAT = warnings.formatwarning


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `uvim-fsq` and `python -m uvim_fsq`."""
    argv = sys.argv[1:] if argv is None else argv
    _run(lambda: build_parser(argv), argv)


def run_command(name: str, description: str | None) -> None:
    """Entry point of a script in tools/: runs the command `name` with the script's arguments.

    Args:
        description: the script's docstring, which its --help shows.
    """
    program, *argv = sys.argv
    _run(lambda: script_parser(name, argv, Path(program).name, description or ""), argv)


def _run(make_parser: Callable[[], argparse.ArgumentParser], argv: Sequence[str]) -> None:
    """Parses `argv`, runs the command, and ends all processes if one fails."""
    try:
        with ended_by_sigterm():
            _parse_and_run(make_parser(), argv)
            if "uvim_fsq.processes" in sys.modules:  # importing it takes seconds
                sys.modules["uvim_fsq.processes"].part()
    except BaseException as error:
        if "uvim_fsq.processes" in sys.modules:
            sys.modules["uvim_fsq.processes"].end_at_once(error)
        raise


def _several() -> bool:
    return (os.environ.get("WORLD_SIZE") or "1") != "1"


def _parse_and_run(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    # --debug is accepted anywhere.
    debug = "--debug" in argv
    argv = [arg for arg in argv if arg != "--debug"]
    # argparse accepts positional arguments only in one place, but key=value may also follow options.
    args, late = parser.parse_known_args(argv)
    target = getattr(args, "overrides", getattr(args, "inputs", None))
    if late and (target is None or any(arg.startswith("-") or "=" not in arg for arg in late)):
        parser.error(f"unrecognized arguments: {' '.join(late)}")
    if target is not None:
        target += late
    warnings.formatwarning = _one_line_warning
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may hold any bytes
    try:
        if _several() and args.command not in SHARED:
            raise UserError(
                f"this command runs in one process, not in {os.environ['WORLD_SIZE']}; start it without a launcher"
            )
        with trusting(getattr(args, "trust", False)):
            args.command.run(args)
    except UserError as error:
        if debug:
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG and not debug:
            print(
                f"error: a file name is too long ({str(error.filename)[:60]}...); give a shorter one", file=sys.stderr
            )
            raise SystemExit(2) from None
        if debug or error.errno not in (errno.ENOSPC, errno.EACCES, errno.EROFS):
            raise
        where = f" ({error.filename})" if error.filename else ""
        print(f"error: {error.strerror}{where}; free space or choose another folder", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
