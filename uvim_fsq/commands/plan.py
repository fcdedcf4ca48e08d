"""`uvim-fsq plan`: computes micro-batches, memory, time and cost of a training on given GPUs."""

from __future__ import annotations

import argparse
from pathlib import Path

from uvim_fsq.commands.common import add_overrides
from uvim_fsq.config.shipped import find_config

HELP = "compute the memory, time and cost of a training on given GPUs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("config", help="a YAML file, or the name of a shipped one, e.g. nyu_depth/oracle")
    add_overrides(parser)
    parser.add_argument("--gpus", type=int, required=True, help="number of GPUs, one process each")
    parser.add_argument("--gpu-memory", type=float, required=True, metavar="GB", help="memory of one GPU")
    parser.add_argument("--gpu", default="H100", help="GPU whose datasheet gives the peak rates (default: H100)")
    parser.add_argument(
        "--share-of-peak", type=float, default=0.4, metavar="X", help="share of the peak that is reached (default: 0.4)"
    )
    parser.add_argument("--price-per-gpu-hour", type=float, metavar="Y", help="adds the price, in any currency")
    parser.add_argument("--images", type=int, metavar="N", help="training images (default: count those of data.root)")
    parser.add_argument("--oracle", type=Path, help="configuration of the oracle of an LM (default: found by name)")


def run(args: argparse.Namespace) -> None:
    """Prints the plan."""
    find_config(args.config)

    from uvim_fsq.benchmark.plan import Hardware, lines_of, make_plan, read_work

    hardware = Hardware(args.gpus, args.gpu_memory, args.gpu, args.share_of_peak, args.price_per_gpu_hour)
    work = read_work(args.config, args.overrides, gpus=args.gpus, oracle=args.oracle, images=args.images)
    print("\n".join(lines_of(make_plan(work, hardware))))
