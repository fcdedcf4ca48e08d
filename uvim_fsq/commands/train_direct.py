"""`uvim-fsq train-direct`: trains the direct baseline."""

from __future__ import annotations

import argparse

from uvim_fsq.commands.train import add_arguments as add_arguments
from uvim_fsq.commands.train import train_stage

HELP = "direct baseline: train an image encoder and a label head, without tokens"


def run(args: argparse.Namespace) -> None:
    """Trains a direct model."""
    train_stage(args, "direct")
