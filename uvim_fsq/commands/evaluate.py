"""`uvim-fsq evaluate`: evaluates a run by its task's protocol."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from uvim_fsq.commands.common import add_overrides, check_places, check_run, print_result
from uvim_fsq.console import say
from uvim_fsq.errors import UserError
from uvim_fsq.files import inside, refuse_links, write_json

HELP = "evaluate a run by its task's protocol"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("run", help="run or checkpoint directory, or hub:OWNER/NAME@REVISION")
    add_overrides(parser, "e.g. task.protocol=eigen data.root=...")
    parser.add_argument("--limit", type=int, help="use only the first N images")
    parser.add_argument("--csv", type=Path, help="write the metrics of each image to this file")
    parser.add_argument(
        "--json",
        type=Path,
        help="result file (default: RUN/evaluation.json, or a file next to it if settings differ)",
    )
    parser.add_argument(
        "--baseline", action="store_true", help="also evaluate the trivial baseline, computed from the training split"
    )
    parser.add_argument(
        "--compare",
        metavar="DIRECT_RUN",
        action="append",
        default=[],
        help="also evaluate this run of the direct baseline on the same images",
    )
    parser.add_argument(
        "--states", type=Path, help="write each image's share in the metrics to this .npz file, for later intervals"
    )
    parser.add_argument("--report", type=Path, help="write an HTML page with metrics, panels and curves to this file")
    parser.add_argument(
        "--decodings",
        action="store_true",
        help="also evaluate the LM with other settings of decoding, one changed at a time: codes, steps, samples, ...",
    )
    parser.add_argument(
        "--official",
        action="store_true",
        help="also write the benchmark's official result files and compute its official scores",
    )


def run(args: argparse.Namespace) -> None:
    """Evaluates the run, prints a table and writes the result as JSON."""
    from uvim_fsq.checkpoints.hub import results_folder
    from uvim_fsq.checkpoints.run_directory import resolve_checkpoint
    from uvim_fsq.evaluation.results import result_file, variant_path

    compare = _at_most_one(args.compare)
    limited = [f"eval.limit={args.limit}"] if args.limit is not None else []
    changed = check_run(args.run, [*args.overrides, *limited])
    # Results of a subset or with other settings must not replace those of the run as trained.
    place = results_folder(args.run)
    official = variant_path(place / "official", changed) if args.official else None
    if official:
        inside(place, official / "oracle")
        refuse_links(official)
    file = result_file(place)
    if compare is not None:
        resolve_checkpoint(compare)
    places = [args.json or variant_path(file, changed), args.csv, args.report, args.states]
    check_places(places, [official] if official else [])

    from uvim_fsq import processes
    from uvim_fsq.evaluation.examination import Examined
    from uvim_fsq.evaluation.run import evaluate
    from uvim_fsq.reports.evaluation_page import write_run_page

    examined: dict[str, Examined] | None = {} if args.report is not None else None
    result = evaluate(
        args.run,
        args.overrides,
        limit=args.limit,
        csv=args.csv,
        baseline=args.baseline,
        official=official,
        compare=compare,
        states=args.states,
        examined=examined,
        decodings=args.decodings,
    )
    if not processes.is_main():
        return
    # The checkpoint, and with it the tuned settings, may be another one than `changed` is about.
    file = args.json or variant_path(file, result["overrides"])
    write_json(file, result)
    if args.report is not None:
        write_run_page(args.report, args.run, [*args.overrides, *limited], result, compare, examined)
    print_result(result)
    if result["baseline"]:
        print(f"baseline: {result['baseline']}")
    print(f"written: {file}" + (f", {official}/" if official else ""))
    for name, about in result.get("compared", {}).items():
        print(f"{name}: checkpoint {about['checkpoint']} ({about['checkpoint_sha256'][:12]})")
    if {"lm", "direct"} & result["figures"].keys():
        say(f"next: uvim-fsq predict {args.run} PHOTOS --out predictions")
    else:
        say(f"next: uvim-fsq train-lm LM_CONFIG.yaml oracle={args.run} train.out=...")


def _at_most_one(runs: Sequence[str]) -> str | None:
    """The run to compare with, or None. Raises UserError for several: results have one row of a direct baseline."""
    if len(runs) > 1:
        raise UserError(
            f"--compare is given {len(runs)} times, but a result has one row of a direct baseline; give one, or "
            "evaluate once for each, with --json files of their own"
        )
    return runs[0] if runs else None
