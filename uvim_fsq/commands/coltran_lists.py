"""`uvim-fsq data coltran-lists`: writes the image lists of the ColTran FID protocol."""

from __future__ import annotations

import argparse
from pathlib import Path

from uvim_fsq.commands.common import check_places

HELP = "write the image lists of the ColTran FID protocol"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("--out", required=True, help="folder for the two lists")


def run(args: argparse.Namespace) -> None:
    """Writes the two lists."""
    check_places(folders=[args.out])

    from uvim_fsq.tasks.imagenet_color.coltran import write_lists

    for path in write_lists(Path(args.out)):
        print(path)
