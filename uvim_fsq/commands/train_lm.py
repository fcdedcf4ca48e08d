"""`uvim-fsq train-lm`: trains stage II."""

from __future__ import annotations

import argparse

from uvim_fsq.commands.train import add_arguments as add_arguments
from uvim_fsq.commands.train import train_stage

HELP = "stage II: train the language model on a frozen oracle"


def run(args: argparse.Namespace) -> None:
    """Trains a language model."""
    train_stage(args, "lm")
