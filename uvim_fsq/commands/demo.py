"""`uvim-fsq demo`: shows what a run predicts on a page in the browser."""

from __future__ import annotations

import argparse
import importlib.util

from uvim_fsq.commands.common import add_overrides, check_run
from uvim_fsq.errors import UserError

HELP = "try a run in the browser: predict photos, compare samples, swap tokens"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("run", help="run or checkpoint directory, or hub:OWNER/NAME@REVISION")
    add_overrides(parser, "settings of the run")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1: this computer only)")
    parser.add_argument("--port", type=int, default=7860, help="port to listen on (7860; 0: any free one)")


def run(args: argparse.Namespace) -> None:
    """Serves the page until a signal ends the process."""
    if importlib.util.find_spec("gradio") is None:
        raise UserError("the demo needs Gradio: pip install 'uvim-fsq[demo]'")
    check_run(args.run, args.overrides)

    from uvim_fsq.demo.server import serve

    serve(args.run, args.overrides, args.host, args.port)
