"""`uvim-fsq quickstart`: synthetic data, both training stages, evaluation and a report in one command."""

from __future__ import annotations

import argparse
from pathlib import Path

from uvim_fsq.commands.common import add_overrides, check_places, say_next_of_predictor
from uvim_fsq.console import say

HELP = "render data, train both stages, evaluate, write a report"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("--task", default="nyu_depth", help="nyu_depth (default), or another task")
    parser.add_argument(
        "--out", help="folder of the results (default: runs/quickstart, for other tasks runs/quickstart_TASK)"
    )
    add_overrides(parser, "settings of both stages, e.g. train.steps=100")
    parser.add_argument("--scenes", type=int, help="number of training scenes (default: 16000, with --gpu-scale 60000)")
    parser.add_argument(
        "--compare", action="store_true", help="also train the direct baseline, which has no tokens, to compare with"
    )
    parser.add_argument("--gpu-scale", action="store_true", help="use a larger version that needs a GPU")


def run(args: argparse.Namespace) -> None:
    """Runs the whole pipeline on synthetic scenes."""
    out = args.out or f"runs/quickstart{'' if args.task == 'nyu_depth' else '_' + args.task}"
    from uvim_fsq.tasks.registry import config_class

    config_class(args.task)
    check_places(folders=[out])
    say(f"{out}: loading ...")

    from uvim_fsq.experiments.quickstart import quickstart

    quickstart(Path(out), args.gpu_scale, args.task, scenes=args.scenes, overrides=args.overrides, compare=args.compare)
    say_next_of_predictor(Path(out) / "lm")
