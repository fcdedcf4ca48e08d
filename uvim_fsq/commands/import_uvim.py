"""`uvim-fsq import-uvim`: converts a published UViM checkpoint to a run directory."""

from __future__ import annotations

import argparse
from pathlib import Path

from uvim_fsq.commands.common import add_overrides, check_places, say_next_of_predictor
from uvim_fsq.console import say
from uvim_fsq.errors import UserError

HELP = "convert a published UViM checkpoint (.npz) to a run directory"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("file", type=Path, help="the published .npz file")
    parser.add_argument(
        "--stage", default="oracle", choices=("oracle", "lm"), help="stage I, the oracle (default), or stage II, the LM"
    )
    parser.add_argument("--task", help="stage I: depth, panoptic (needs data.root= for its categories) or color")
    parser.add_argument("--oracle", type=Path, help="stage II: the run directory of the imported stage I")
    parser.add_argument("--out", required=True, type=Path, help="new run directory")
    add_overrides(parser, "e.g. data.root=coco eval.batch_size=8")


def run(args: argparse.Namespace) -> None:
    """Imports one stage."""
    unused = ("--oracle", args.oracle) if args.stage == "oracle" else ("--task", args.task)
    if unused[1] is not None:
        raise UserError(f"{unused[0]} has no meaning with --stage {args.stage}; leave it out")
    check_places(folders=[args.out])
    say(f"{args.file}: importing ...")

    from uvim_fsq.interop.import_uvim import import_lm, import_oracle

    if args.stage == "oracle":
        if not args.task:
            raise UserError("stage I needs --task depth, panoptic or color")
        out = import_oracle(args.file, args.task, args.out, args.overrides)
    else:
        if args.oracle is None:
            raise UserError("stage II needs --oracle, the run directory of its stage I")
        out = import_lm(args.file, args.oracle, args.out, args.overrides)
    say(f"imported: {out}")
    if args.stage == "oracle":
        say(f"next: uvim-fsq evaluate {out}, or uvim-fsq import-uvim LM.npz --stage lm --oracle {out} --out ...")
    else:
        say_next_of_predictor(out)
