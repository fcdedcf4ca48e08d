"""`uvim-fsq data view`: shows samples, labels, augmentation and statistics of a data set as one HTML page."""

from __future__ import annotations

import argparse
from pathlib import Path

from uvim_fsq.commands.common import check_places
from uvim_fsq.commands.data_check import add_data_arguments, read_data_config, write_page
from uvim_fsq.errors import UserError

HELP = "show samples, labels, augmentation and statistics as an HTML page"
#: The most samples that a page shows; more would be too large for a browser.
MOST = 200


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    add_data_arguments(parser)
    parser.add_argument("--split", default="train", help="train, val, holdout, ... (default: train)")
    parser.add_argument("--num", type=int, default=8, metavar="N", help="samples to show (default: 8)")
    parser.add_argument("--out", type=Path, default=Path("data.html"), metavar="FILE", help="default: data.html")


def run(args: argparse.Namespace) -> None:
    """Writes the page."""
    run = read_data_config(args)
    if not 1 <= args.num <= MOST:
        raise UserError(f"--num {args.num}: show at least 1 and at most {MOST} samples")
    check_places(files=[args.out])

    from uvim_fsq.checkpoints.loading import build_task, resolve_task
    from uvim_fsq.data.roots import find_data_root
    from uvim_fsq.tasks.contract import refuse_faults

    find_data_root(args.path)
    refuse_faults(build_task(resolve_task(run)), args.path, args.split)
    write_page(args, args.out, (args.split,), num=args.num)
