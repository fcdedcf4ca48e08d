"""The command line's parser. A user's mistake is one line with the remedy and exit code 2."""

from __future__ import annotations

import argparse
import errno
import os
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from uvim_fsq.commands import (
    ablate,
    analyze,
    benchmark,
    coltran_lists,
    config,
    data_check,
    data_prepare,
    evaluate,
    import_uvim,
    predict,
    quickstart,
    synth,
    train_lm,
    train_oracle,
)
from uvim_fsq.config.plugins import trusting
from uvim_fsq.console import clear
from uvim_fsq.errors import UserError
from uvim_fsq.training.signals import ended_by_sigterm

COMMANDS: dict[str, ModuleType] = {
    "quickstart": quickstart,
    "train-oracle": train_oracle,
    "train-lm": train_lm,
    "config": config,
    "evaluate": evaluate,
    "analyze": analyze,
    "predict": predict,
    "synth": synth,
    "ablate": ablate,
    "import-uvim": import_uvim,
    "benchmark": benchmark,
}
DATA_COMMANDS: dict[str, ModuleType] = {
    "check": data_check,
    "prepare": data_prepare,
    "coltran-lists": coltran_lists,
}
#: Commands whose --help lists the configuration keys of a stage.
LISTS_KEYS = {"train-oracle": "oracle", **dict.fromkeys(("train-lm", "config", "evaluate", "analyze", "predict"), "lm")}
#: Commands that read no run directory, and so import no plugins that a run names.
READS_NO_RUN = ("synth",)
#: Commands that several processes can share; each of them would otherwise do all of the work, into the same files.
SHARED = (train_oracle, train_lm, evaluate, analyze)


def _config_epilog(stage: str) -> str:
    from uvim_fsq.config.parse import describe_keys
    from uvim_fsq.config.schema import LMRun, OracleRun

    lines = ["keys (key=value on the command line, nested in the YAML):", ""]
    for key, kind, default, doc in describe_keys(OracleRun if stage == "oracle" else LMRun):
        lines += [f"  {key}  [{kind}; default {default}]", f"      {doc}"]
    return "\n".join([*lines, "", "the keys of each task under task.:", *_task_keys()])


def _task_keys() -> list[str]:
    from uvim_fsq.config.parse import describe_keys
    from uvim_fsq.tasks.registry import config_class, task_names

    lines: list[str] = []
    for name in task_names():
        lines.append(f"  task.name={name}")
        for key, kind, default, doc in describe_keys(config_class(name), "task."):
            lines += [f"    {key}  [{kind}; default {default}]", f"        {doc}"]
    return lines


def _add(parsers: Any, name: str, command: ModuleType, epilog: str | None = None) -> argparse.ArgumentParser:
    parser = parsers.add_parser(
        name,
        help=command.HELP,
        description=command.HELP,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_arguments(parser)
    parser.set_defaults(command=command)
    return parser


def build_parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """All commands. `argv` decides whether the long list of keys is made: only where a command's --help asks for it."""
    parser = argparse.ArgumentParser(prog="uvim-fsq", description="Dense prediction by discrete tokens.")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        listed = name in LISTS_KEYS and name in argv and ("-h" in argv or "--help" in argv)
        sub = _add(parsers, name, command, _config_epilog(LISTS_KEYS[name]) if listed else None)
        if name not in READS_NO_RUN:
            text = "import the plugins that a run names, whoever made it (as does UVIM_FSQ_TRUST=1)"
            sub.add_argument("--trust", action="store_true", help=text)
    data = parsers.add_parser("data", help="check and prepare data sets")
    actions = data.add_subparsers(required=True, metavar="ACTION")
    for name, command in DATA_COMMANDS.items():
        _add(actions, name, command)
    return parser


def _one_line_warning(message: Warning | str, category: type[Warning], *place: Any, **line: Any) -> str:
    """The package's own warnings are meant for the user: the line of code that raised them is left out."""
    clear()
    return f"warning: {message}\n" if category is UserWarning else _PLAIN_WARNING(message, category, *place, **line)


_PLAIN_WARNING = warnings.formatwarning


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
        if _several() and args.command not in SHARED:
            raise UserError(f"this command runs in one process, not in {os.environ['WORLD_SIZE']}: start no launcher")
        with trusting(getattr(args, "trust", False)):
            args.command.run(args)
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
