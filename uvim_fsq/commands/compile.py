"""`uvim-fsq compile`: compiles the prediction of a trained LM or direct model ahead of time."""

from __future__ import annotations

import argparse
from pathlib import Path

from uvim_fsq.commands.common import add_overrides, check_run
from uvim_fsq.console import say
from uvim_fsq.errors import UserError

HELP = "compile a model's prediction ahead of time, for faster predict and evaluate"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("run", help="run or checkpoint directory of an LM or a direct model")
    add_overrides(parser, "decoding settings to compile for, e.g. eval.codes=soft")
    parser.add_argument("--batch", default="1,32", metavar="LIST", help="batch sizes (default: 1,32)")


def run(args: argparse.Namespace) -> None:
    """Compiles the packages and writes them into the folder compiled/ of the run's checkpoint."""
    batches = _sizes(args.batch)
    check_run(args.run, args.overrides)

    from uvim_fsq import processes
    from uvim_fsq.checkpoints.loading import load_any
    from uvim_fsq.inference.ahead_of_time import compile_checkpoint

    device = processes.device()
    file = compile_checkpoint(load_any(args.run, args.overrides, device), batches, device, Path(args.run))
    print(f"written: {file.parent}")
    settings = " ".join(args.overrides)
    say(f"next: uvim-fsq predict {args.run} PHOTOS{f' {settings}' if settings else ''} --out predictions")


def _sizes(text: str) -> list[int]:
    try:
        sizes = [int(value) for value in text.split(",")]
    except ValueError:
        sizes = [0]
    if min(sizes) < 1:
        raise UserError(f"--batch {text}: give batch sizes above 0 such as 1,32")
    return sizes
