"""`uvim-fsq tune`: chooses the decoding settings of an LM on a hold-out."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from uvim_fsq.commands.common import add_overrides, check_places
from uvim_fsq.console import say
from uvim_fsq.errors import UserError
from uvim_fsq.files import inside

HELP = "choose how an LM's tokens are decoded, on a hold-out"
#: Candidates in the printed table.
SHOWN = 5
T = TypeVar("T", str, int, float)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("run", help="run or checkpoint directory of an LM")
    add_overrides(parser, "e.g. task.decoding=expectation data.root=...")
    parser.add_argument("--split", help="images to choose on (default: data.selection_split), never data.eval_split")
    parser.add_argument(
        "--unseen", action="store_true", help="data.root holds other images than those of training and evaluation"
    )
    parser.add_argument("--limit", type=int, help="use only the first N images")
    parser.add_argument("--codes", metavar="LIST", help="eval.codes to try (default: hard,soft)")
    parser.add_argument("--scales", metavar="LIST", help="eval.code_scale to try (default: 0.5,0.7,0.85,1)")
    parser.add_argument("--weights", metavar="LIST", help="eval.context_weight to try (default: 0,0.1,0.2,0.3,0.4,0.5)")
    parser.add_argument("--steps", metavar="LIST", help="also try these eval.steps (masked models), e.g. 4,8")
    parser.add_argument("--samples", metavar="LIST", help="also try averages of so many samples, e.g. 4,8")
    parser.add_argument("--temperature", type=float, help="eval.temperature of these samples (default: 1)")


def run(args: argparse.Namespace) -> None:
    """Tunes the run, prints a table and writes decoding.json into its checkpoint."""
    from uvim_fsq.checkpoints.hub import refuse_downloaded
    from uvim_fsq.checkpoints.run_directory import resolve_checkpoint
    from uvim_fsq.checkpoints.tuned import DECODING, tuning_split

    lists: dict[str, Any] = {
        "codes": _values(args.codes, "--codes", _code_kind),
        "scales": _values(args.scales, "--scales", float),
        "weights": _values(args.weights, "--weights", float),
        "steps": _values(args.steps, "--steps", int),
        "samples": _values(args.samples, "--samples", int),
    }
    if args.temperature is not None:
        if not lists["samples"]:
            raise UserError(
                f"--temperature {args.temperature:g} is that of the samples of --samples; give both, e.g. --samples 4,8"
            )
        lists["temperature"] = args.temperature
    refuse_downloaded(args.run, "tune writes the settings into the run")
    checkpoint = resolve_checkpoint(args.run)
    split = tuning_split(checkpoint, args.overrides, args.split, unseen=args.unseen)
    check_places([inside(Path(args.run), checkpoint / DECODING)])
    say(f"{args.run}: loading ...")

    from uvim_fsq import processes
    from uvim_fsq.evaluation.tuning import Grid, tune

    grid = Grid(**{name: values for name, values in lists.items() if values != ()})
    result = tune(args.run, args.overrides, split=split, unseen=args.unseen, limit=args.limit, grid=grid)
    if not processes.is_main():
        return
    _print_table(result)
    print(f"written: {Path(result['checkpoint']) / DECODING}; eval.tuned=false ignores it")
    say(f"next: uvim-fsq evaluate {args.run}")


def _code_kind(text: str) -> str:
    if text not in ("hard", "soft"):
        raise ValueError(text)
    return text


def _values(text: str | None, flag: str, convert: Callable[[str], T]) -> tuple[T, ...]:
    """The values of a comma-separated list; empty if there is none."""
    if text is None:
        return ()
    try:
        return tuple(convert(value.strip()) for value in text.split(","))
    except ValueError:
        example = {"--codes": "hard,soft", "--steps": "4,8", "--samples": "4,8"}.get(flag, "0,0.5")
        raise UserError(f"{flag} {text}: give a list such as {example}") from None


def _print_table(result: dict[str, Any]) -> None:
    """Prints the best settings, those before, and context alone."""
    from rich.console import Console
    from rich.table import Table

    metric, keys = result["metric"], list(result["settings"])
    shown = [key for key in keys if len({str(row[key]) for row in result["candidates"]}) > 1]
    table = Table(title=f"{result['protocol']} on {result['split']}, {result['images']} images")
    table.add_column("", no_wrap=True)
    for key in shown:
        table.add_column(key.replace("_", " ").replace("temperature", "temp."))
    table.add_column(metric, justify="right")
    sign = 1 if result["smaller_is_better"] else -1
    finite = [row for row in result["candidates"] if math.isfinite(row[metric])]
    chosen = {**result["settings"], metric: result["value"]}
    others = [row for row in sorted(finite, key=lambda row: sign * row[metric]) if row != chosen]
    for title, row in [("chosen", chosen), *(("", row) for row in others[: SHOWN - 1]), ("before", result["own"])]:
        table.add_row(title, *(str(row[key]) for key in shown), f"{row[metric]:.4f}")
    if result["context_only"] is not None:
        table.add_row("context alone", *("" for _ in shown), f"{result['context_only']:.4f}")
    Console().print(table)
    largest = max(row["context_weight"] for row in result["candidates"])
    if result["settings"]["context_weight"] == largest and 0 < largest < 1:
        print(
            "the chosen context weight is the largest that was tried; try larger ones, e.g. --weights 0.5,0.6,0.7,0.8"
        )
    if result["context_only"] is not None and sign * result["context_only"] <= sign * result["value"]:
        print("none of them is better than context alone: on these images the LM's tokens add nothing")
