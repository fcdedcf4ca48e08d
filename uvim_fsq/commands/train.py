"""The common part of `uvim-fsq train-oracle`, `train-lm` and `train-direct`."""

from __future__ import annotations

import argparse
from pathlib import Path

from uvim_fsq.commands.common import add_overrides, check_places, say_next_of_predictor
from uvim_fsq.config.schema import Run
from uvim_fsq.config.shipped import find_config
from uvim_fsq.console import is_first, say
from uvim_fsq.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of these commands."""
    parser.add_argument("config", help="a YAML file, or the name of a shipped one, e.g. nyu_depth/oracle")
    add_overrides(parser)


def train_stage(args: argparse.Namespace, stage: str) -> None:
    """Trains the stage "oracle", "lm" or "direct". What can be checked without torch is checked before its import."""
    from uvim_fsq.tasks.configuration import load_run

    run = load_run(args.config, args.overrides)
    if run.stage != stage:
        raise UserError(f"{args.config} is a configuration of stage {run.stage!r}; use uvim-fsq train-{run.stage}")
    out = train_run(run, args.config)
    if stage == "oracle":
        say(f"next: uvim-fsq train-lm {_lm_config(args.config)} oracle={out} train.out=...")
    else:
        say_next_of_predictor(out)
    if stage == "direct":
        say(f"or, to compare: uvim-fsq evaluate LM_RUN --compare {out}")


def train_run(run: Run, source: str) -> Path:
    """Trains and evaluates a configuration, which came from `source`. Returns the run directory."""
    from uvim_fsq.checkpoints.ancestors import inherit
    from uvim_fsq.checkpoints.run_directory import resume_from
    from uvim_fsq.data.roots import find_data_root
    from uvim_fsq.tasks.registry import BUILT_IN

    run = inherit(run)
    check_places(folders=[run.train.out])
    if is_first():
        resume_from(Path(run.train.out), run.train.resume)
    if run.task.name in BUILT_IN:
        find_data_root(run.data.root)
    say(f"{source}: loading ...")

    from uvim_fsq.training.run import train_inherited

    out = train_inherited(run)
    say(f"trained: {out}")
    return out


def _lm_config(oracle_config: str) -> str:
    """The LM configuration of an oracle configuration, e.g. quickstart_lm.yaml of quickstart_oracle.yaml."""
    path = Path(oracle_config)
    other = path.with_name(path.name.replace("oracle", "lm"))
    try:
        find_config(other)
    except UserError:
        return "LM_CONFIG.yaml"
    return str(other) if other != path else "LM_CONFIG.yaml"
