"""`uvim-fsq train-oracle`: trains stage I."""

from __future__ import annotations

import argparse

from uvim_fsq.commands.train import add_arguments as add_arguments
from uvim_fsq.commands.train import train_stage

HELP = "stage I: train a task's oracle"


def run(args: argparse.Namespace) -> None:
    """Trains an oracle."""
    train_stage(args, "oracle")
