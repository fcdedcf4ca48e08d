"""`uvim-fsq benchmark`: measures speed and compares it with the limits of the device."""

from __future__ import annotations

import argparse
from pathlib import Path

from uvim_fsq.benchmark import JOBS
from uvim_fsq.commands.common import add_overrides, check_places

HELP = (
    "measure the speed of training, decoding, loading, metrics, start-up and predict, and compare it with the device's "
    "limits"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("job", choices=JOBS)
    parser.add_argument(
        "config",
        nargs="?",
        help="configuration of either stage, e.g. nyu_depth/quickstart_lm; start-up and predict also take a run",
    )
    add_overrides(parser)
    parser.add_argument(
        "--oracle", type=Path, help="configuration of the LM's oracle (default: the one in the same folder)"
    )
    parser.add_argument(
        "--batch", type=int, nargs="+", default=[], help="batch sizes for decoding, predict; training uses the first"
    )
    parser.add_argument(
        "--repeats", type=int, default=5, help="number of timed repeats, of which the median is printed (default 5)"
    )
    parser.add_argument("--json", type=Path, help="write all measurements to this file")
    parser.add_argument("--against", type=Path, metavar="FILE", help="compare with the --json file of an earlier run")
    parser.add_argument(
        "--peer", type=Path, metavar="FILE", help="show another program's figures beside ours (docs/performance.md)"
    )
    parser.add_argument(
        "--export",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="predict: also measure this folder of `uvim-fsq export`; may be repeated",
    )
    parser.add_argument(
        "--operators", type=int, default=0, metavar="N", help="also list the N most expensive operators"
    )


def run(args: argparse.Namespace) -> None:
    """Runs the job and prints a table."""
    check_places([args.json])

    from uvim_fsq.benchmark.run import read_request, run_benchmark

    request = read_request(
        args.job,
        args.config,
        args.overrides,
        oracle=args.oracle,
        batches=tuple(args.batch),
        repeats=args.repeats,
        exports=tuple(args.export),
    )
    run_benchmark(
        request,
        json_file=args.json,
        against=args.against,
        num_operators=args.operators,
        say=lambda text: print(text, flush=True),
        peer_file=args.peer,
    )
