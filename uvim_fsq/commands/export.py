"""`uvim-fsq export`: writes the prediction of a trained LM or direct model as an ONNX model or a torch program."""

from __future__ import annotations

import argparse
from pathlib import Path

from uvim_fsq.commands.common import add_overrides, check_places, check_run
from uvim_fsq.console import say
from uvim_fsq.errors import UserError
from uvim_fsq.files import inside, refuse_links

HELP = "write a model's prediction as one ONNX model or torch program, to run it elsewhere"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("run", help="run or checkpoint of an LM or a direct model, or hub:OWNER/NAME@REVISION")
    add_overrides(parser, "decoding settings to export, e.g. eval.codes=soft task.decoding=expectation")
    parser.add_argument("--format", choices=("onnx", "torch"), required=True, help="ONNX, or a file of torch.export")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder (default: RUN/export_FORMAT, with --int8 RUN/export_onnx_int8)"
    )
    parser.add_argument(
        "--int8", action="store_true", help="onnx: 8-bit weights, a third of the size; predictions change slightly"
    )


def run(args: argparse.Namespace) -> None:
    """Exports the run's checkpoint."""
    from uvim_fsq.checkpoints.hub import results_folder

    if args.int8 and args.format != "onnx":
        raise UserError("--int8 works only with --format onnx")
    check_run(args.run, args.overrides)
    folder = args.out
    if folder is None:
        folder = results_folder(args.run) / f"export_{args.format}{'_int8' if args.int8 else ''}"
        inside(folder.parent, folder / "x")
        refuse_links(folder)
    check_places(folders=[folder])

    from uvim_fsq.checkpoints.loading import load_any
    from uvim_fsq.inference.exporting import export_checkpoint

    manifest = export_checkpoint(load_any(args.run, args.overrides), args.format, folder, int8=args.int8)
    for name, about in manifest["measured"].items():
        print(f"{name}: differs from PyTorch's by up to {about['largest']:.2g}, {about['share']:.2%} of the values")
    size = sum((folder / name).stat().st_size for name in manifest["files"]) / 1e6
    print(f"written: {folder}, {size:,.1f} MB")
    say(f"next: uvim-fsq predict {folder} PHOTOS --out predictions, or docs/exporting.md for use without this package")
