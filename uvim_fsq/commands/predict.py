"""`uvim-fsq predict`: predicts images with a trained LM or direct model."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from uvim_fsq.commands.common import check_places, check_run
from uvim_fsq.console import say
from uvim_fsq.errors import UserError

HELP = "predict images with a trained LM or direct model"
#: Number of failures listed one by one; the rest are only counted.
SHOWN = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("run", help="run or checkpoint of an LM or a direct model, or hub:OWNER/NAME@REVISION")
    parser.add_argument(
        "inputs", nargs="+", metavar="IMAGE|FOLDER|key=value", help="images and folders, and settings of the run"
    )
    parser.add_argument("--out", required=True, help="folder for the results")


def run(args: argparse.Namespace) -> None:
    """Predicts all images. Raises UserError at the end if some could not be predicted."""
    overrides = [entry for entry in args.inputs if "=" in entry and not Path(entry).exists()]
    inputs = [entry for entry in args.inputs if entry not in overrides]
    if not inputs:
        raise UserError("name at least one image or folder to predict")
    from uvim_fsq.data.folders import list_images

    list_images(inputs)
    check_run(args.run, overrides)
    check_places(folders=[args.out])

    from uvim_fsq.inference.prediction_folder import INDEX
    from uvim_fsq.inference.predictor import predict_files

    entries = predict_files(args.run, inputs, args.out, overrides)
    errors = [entry["error"] for entry in entries if "error" in entry]
    done = len(entries) - len(errors)
    say(f"{done} of {len(entries)} images predicted into {args.out}, listed in {Path(args.out) / INDEX}")
    if errors:
        for error in errors[:SHOWN]:
            print(f"failed: {' '.join(error.split())}", file=sys.stderr)
        more = f", {len(errors) - SHOWN} of them not shown" if len(errors) > SHOWN else ""
        raise UserError(f"{len(errors)} of {len(entries)} images could not be predicted{more}; the index lists all")
