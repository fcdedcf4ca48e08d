"""`uvim-fsq tune-decoder`: trains the oracle's decoder on the tokens that an LM predicts."""

from __future__ import annotations

import argparse
from pathlib import Path

from uvim_fsq.commands.common import add_overrides, say_next_of_predictor
from uvim_fsq.commands.train import train_run
from uvim_fsq.config.schema import LMRun
from uvim_fsq.errors import UserError

HELP = "train the oracle's decoder on the tokens that an LM predicts, as a new run"
#: Steps, as a share of the LM's.
SHARE = 0.1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("run", help="run or checkpoint directory of an LM; it is not changed")
    add_overrides(parser, "e.g. train.out=... train.steps=1000 decoder_tuning.true_share=0.5")
    parser.add_argument("--split", help="images to train on (default: data.selection_split), never data.eval_split")


def run(args: argparse.Namespace) -> None:
    """Trains and evaluates the new run."""
    from uvim_fsq.checkpoints.run_directory import find_oracle, parse_config, resolve_checkpoint
    from uvim_fsq.checkpoints.tuned import tuning_split

    checkpoint = resolve_checkpoint(args.run)
    trained = parse_config(checkpoint)[0]
    if not isinstance(trained, LMRun):
        raise UserError(f"{args.run} is of stage {trained.stage}; give the run of an LM")
    split = "train" if args.split == "train" else tuning_split(checkpoint, (), args.split)
    settings = [
        f"oracle={find_oracle(checkpoint, trained)}",
        f"decoder_tuning.run={checkpoint}",
        "model.decoder=trained",
        f"loss.task_weight={trained.loss.task_weight or 1.0}",
        f"data.train_split={split}",
        "data.selection_split=",
        f"train.out={_new_run(args.run)}",
        *_shorter(trained),
        *args.overrides,
    ]
    say_next_of_predictor(train_run(parse_config(checkpoint, settings)[0], args.run))


def _new_run(run: str) -> Path:
    """RUN_decoder, beside the run or the run of the checkpoint."""
    place = Path(run).absolute()
    place = place.parent.parent if place.parent.name == "checkpoints" else place
    return place.with_name(f"{place.name}_decoder")


def _shorter(trained: LMRun) -> list[str]:
    """The length and the rate of the new training: a tenth of the steps or epochs, half the rate, no weight decay."""
    train = trained.train
    if train.steps is None:
        length = [f"train.epochs={(train.epochs or 0) * SHARE}", "optim.warmup_steps=0"]
    else:
        steps = max(1, round(train.steps * SHARE))
        length = [f"train.steps={steps}", f"optim.warmup_steps={steps // 10}"]
    rest = ["train.resume=no", "train.eval_every=null", "train.save_every=null", "optim.weight_decay=0"]
    return [*length, *rest, f"optim.lr={trained.optim.lr / 2}"]
