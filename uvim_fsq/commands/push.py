"""`uvim-fsq push`: uploads a run to a Hugging Face hub."""

from __future__ import annotations

import argparse
from pathlib import Path

from uvim_fsq.commands.common import check_places
from uvim_fsq.config.schema import OracleRun
from uvim_fsq.console import say
from uvim_fsq.errors import UserError

HELP = "upload a run to a Hugging Face hub, where others use it as hub:OWNER/NAME"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("run", help="run or checkpoint directory")
    parser.add_argument("repo", metavar="OWNER/NAME", help="repository; it is made if needed")
    parser.add_argument("--license", help="license of the weights for the model card, e.g. apache-2.0 (default: none)")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--folder", type=Path, help="upload nothing; write what would be uploaded to this new folder")


def run(args: argparse.Namespace) -> None:
    """Uploads the run, or writes the upload to a folder."""
    from uvim_fsq.checkpoints.run_directory import read_config, resolve_checkpoint
    from uvim_fsq.sharing.push import check_request, push, write_folder

    check_request(args.repo, args.license)
    if args.private and args.folder is not None:
        raise UserError("--private is about a repository, and --folder uploads nothing; leave one of them out")
    trained = read_config(resolve_checkpoint(args.run))
    if args.folder is not None:
        check_places(folders=[args.folder])
        write_folder(args.run, args.repo, args.folder, license_id=args.license)
        say(f"written: {args.folder}, as it would be uploaded to {args.repo}")
        return
    say(f"{args.run}: uploading to {args.repo} ...")
    name = push(args.run, args.repo, license_id=args.license, private=args.private)
    say(f"pushed: {name}")
    if isinstance(trained, OracleRun):
        say(f"next: uvim-fsq train-lm LM_CONFIG.yaml oracle={name} train.out=...")
    else:
        say(f"next: uvim-fsq predict {name} PHOTOS --out predictions")
