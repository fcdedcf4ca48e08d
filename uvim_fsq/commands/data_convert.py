"""`uvim-fsq data convert`: converts a data set's original labels to the format that its task reads."""

from __future__ import annotations

import argparse
from pathlib import Path

from uvim_fsq.commands.common import check_places, say_next_of_data
from uvim_fsq.commands.data_check import add_data_arguments, read_data_config
from uvim_fsq.console import Bar, say

HELP = "convert original labels (Cityscapes, ADE20K) to the format that the task reads"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    add_data_arguments(parser)
    parser.add_argument("--out", type=Path, help="folder for the converted labels (default: the data set's folder)")


def run(args: argparse.Namespace) -> None:
    """Converts the labels. Files that exist are never replaced."""
    config = read_data_config(args)
    check_places((), [args.out] if args.out else [])

    from uvim_fsq.tasks.registry import task_class

    assert config.task is not None
    with Bar(f"{args.path}: converting") as bar:
        summary = task_class(args.task).convert(args.path, args.out, bar.update)
    say(summary)
    if args.out is None:
        say_next_of_data(args.task, args.path)
