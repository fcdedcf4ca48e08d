"""`uvim-fsq data prepare`: caches a data set in a format that loads faster."""

from __future__ import annotations

import argparse

from uvim_fsq.commands.common import say_next_of_data
from uvim_fsq.commands.data_check import add_data_arguments as add_arguments
from uvim_fsq.commands.data_check import read_data_config
from uvim_fsq.console import Bar, say

__all__ = ["HELP", "add_arguments", "run"]

HELP = "cache a data set in a format that loads faster"


def run(args: argparse.Namespace) -> None:
    """Prepares the data set."""
    run = read_data_config(args)

    from uvim_fsq.checkpoints.loading import build_task, resolve_task

    with Bar(f"{args.path}: preparing") as bar:
        summary = build_task(resolve_task(run)).prepare(args.path, bar.update)
    say(summary)
    say_next_of_data(args.task, args.path)
