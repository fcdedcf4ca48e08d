"""`uvim-fsq predict`: predicts images and films with a trained LM or direct model."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from uvim_fsq.commands.common import check_places, check_run
from uvim_fsq.console import say
from uvim_fsq.errors import UserError

HELP = "predict images and films with a trained LM or direct model"
#: Number of failures listed one by one; the rest are only counted.
SHOWN = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument(
        "run",
        help="run or checkpoint of an LM or a direct model, hub:OWNER/NAME@REVISION, or a folder of uvim-fsq export",
    )
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="IMAGE|FOLDER|FILM|@LIST|-|key=value",
        help="images, folders, films; @LIST is a file that names one a line, - the same on standard input; and "
        "settings of the run",
    )
    parser.add_argument("--out", required=True, help="folder for the results")
    parser.add_argument(
        "--tiles",
        metavar="PIXELS|auto",
        help="predict large pictures by overlapping square tiles of this side; auto: the models' image side",
    )
    parser.add_argument("--overlap", type=float, help="share of a tile's side that neighbors have in common (0.25)")
    parser.add_argument(
        "--write",
        choices=("files", "film"),
        help="files: results of each picture and frame; film: a film of the predictions, also of a folder of pictures, "
        "in the order of their names; by default films become films and pictures files",
    )
    parser.add_argument("--fps", type=float, help="frames per second of films that are written (that of the film, 25)")
    parser.add_argument(
        "--overwrite", action="store_true", help="predict again what is complete, with this checkpoint and settings"
    )


def _side(text: str | None) -> int | None:
    """The side of tiles in pixels, 0 for "auto", None for none. Raises UserError for any other text."""
    if text is None or text == "auto":
        return None if text is None else 0
    try:
        side = int(text)
    except ValueError:
        raise UserError(f"--tiles {text!r} is neither a number of pixels nor auto") from None
    if side < 1:
        raise UserError(f"--tiles {side}: give a number of pixels above 0, or auto")
    return side


def run(args: argparse.Namespace) -> None:
    """Predicts all images. Raises UserError at the end if some could not be predicted."""
    overrides = [e for e in args.inputs if "=" in e and not e.startswith("@") and not os.path.exists(e)]
    inputs = [entry for entry in args.inputs if entry not in overrides]
    if not inputs:
        raise UserError("name at least one image, folder or film to predict")
    tiles = _side(args.tiles)
    if args.overlap is not None and tiles is None:
        raise UserError("--overlap is that of tiles; give --tiles too, or leave it out")
    from uvim_fsq.checkpoints.layout import is_export
    from uvim_fsq.data.folders import expand_lists, list_images

    inputs = expand_lists(inputs)
    list_images(inputs)
    if is_export(args.run):
        say(f"{args.run}: loading ...")
    else:
        check_run(args.run, overrides)
    check_places(folders=[args.out])

    from uvim_fsq.inference.predict_files import Options, predict_files
    from uvim_fsq.inference.prediction_folder import INDEX

    overlap = Options.overlap if args.overlap is None else args.overlap
    options = Options(tiles, overlap, args.write, args.fps, args.overwrite)
    entries = predict_files(args.run, inputs, args.out, overrides, options)
    errors = [entry["error"] for entry in entries if "error" in entry]
    done = len(entries) - len(errors)
    say(f"{done} of {len(entries)} images predicted into {args.out}, listed in {Path(args.out) / INDEX}")
    if errors:
        for error in errors[:SHOWN]:
            print(f"failed: {' '.join(error.split())}", file=sys.stderr)
        more = f", {len(errors) - SHOWN} of them not shown" if len(errors) > SHOWN else ""
        raise UserError(f"{len(errors)} of {len(entries)} images could not be predicted{more}; the index lists all")
