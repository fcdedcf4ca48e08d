"""`uvim-fsq benchmark`: measured speed, next to what the device allows."""

from __future__ import annotations

import argparse
from pathlib import Path

from uvim_fsq.commands.common import add_overrides, check_places

HELP = "measure training, decoding, loading and metrics against the device's limits"
JOBS = ("train-oracle", "train-lm", "decode", "side-by-side", "loader", "metrics", "all")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("job", choices=JOBS)
    parser.add_argument("config", nargs="?", help="of either stage, e.g. nyu_depth/quickstart_lm")
    add_overrides(parser)
    parser.add_argument("--oracle", type=Path, help="configuration of an LM's oracle (default: the one next to it)")
    parser.add_argument(
        "--batch", type=int, nargs="+", default=[], help="batch sizes of decoding; training uses the first"
    )
    parser.add_argument("--repeats", type=int, default=5, help="timed repeats; their median is printed (default 5)")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    parser.add_argument("--against", type=Path, metavar="FILE", help="compare with an earlier run's --json")
    parser.add_argument("--operators", type=int, default=0, metavar="N", help="also list the N slowest operators")


def run(args: argparse.Namespace) -> None:
    """Runs the jobs and prints a table."""
    check_places([args.json])

    from uvim_fsq.benchmark.run import read_request, run_benchmark

    asked = read_request(
        args.job, args.config, args.overrides, oracle=args.oracle, batches=tuple(args.batch), repeats=args.repeats
    )
    run_benchmark(
        asked,
        json_file=args.json,
        against=args.against,
        num_operators=args.operators,
        say=lambda text: print(text, flush=True),
    )
