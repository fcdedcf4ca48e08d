"""`uvim-fsq config`: prints a resolved configuration."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from uvim_fsq.commands.common import add_overrides
from uvim_fsq.config.shipped import find_config
from uvim_fsq.errors import UserError

HELP = "print the resolved configuration"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("config", help="a YAML file, or the name of a shipped one, e.g. nyu_depth/oracle")
    add_overrides(parser)


def run(args: argparse.Namespace) -> None:
    """Prints the configuration, as far as it is known if data, oracle or run directory do not exist yet."""
    from dataclasses import replace

    from uvim_fsq.checkpoints.ancestors import inherit
    from uvim_fsq.checkpoints.hub import is_hub
    from uvim_fsq.checkpoints.loading import resolve_task
    from uvim_fsq.config.parse import dump_yaml
    from uvim_fsq.config.rules import validate
    from uvim_fsq.config.schema import LMRun
    from uvim_fsq.experiments.ablation.grid import is_grid
    from uvim_fsq.tasks.configuration import load_run

    if is_grid(find_config(args.config)):
        raise UserError(f"{args.config} is a grid; uvim-fsq ablate {args.config} --dry-run prints its cells")
    run = load_run(args.config, args.overrides)
    out, notes = run.train.out, list[str]()
    run = replace(run, train=replace(run.train, out=out or "unnamed"))
    if not isinstance(run, LMRun):
        validate(run)
        try:
            run = resolve_task(run)
        except UserError as error:
            if not str(error).startswith("data.root"):
                raise
            notes.append(f"{error}; settings that depend on the data are left out")
    elif is_hub(run.oracle) or Path(run.oracle).exists():
        run = inherit(run)
    else:
        validate(run)
        notes.append(f"oracle={run.oracle}: no such run yet; task and data, which come from it, are left out")
    if not out:
        notes.append("train.out is empty; training needs a run directory there")
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    print(dump_yaml(replace(run, train=replace(run.train, out=out))), end="")
