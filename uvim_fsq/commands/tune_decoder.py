"""`uvim-fsq tune-decoder`: trains the oracle's decoder on the tokens that an LM predicts."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from uvim_fsq.commands.common import add_overrides, say_next_of_predictor
from uvim_fsq.commands.train import train_run
from uvim_fsq.config.schema import LMRun, Run, TrainConfig
from uvim_fsq.errors import UserError

HELP = "train the oracle's decoder on the tokens that an LM predicts, as a new run"
#: Steps, as a share of the LM's.
SHARE = 0.1
#: How to get images to train on.
REMEDY = (
    "train both stages with data.train_split=train_minus_holdout data.selection_split=holdout, name another split with "
    "--split, or use --split train, the images of training, augmented"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("run", help="run or checkpoint of an LM, or hub:OWNER/NAME@REVISION; it is not changed")
    add_overrides(parser, "e.g. train.out=... train.steps=1000 decoder_tuning.true_share=0.5")
    parser.add_argument("--split", help="images to train on (default: data.selection_split), never data.eval_split")


def run(args: argparse.Namespace) -> None:
    """Trains and evaluates the new run."""
    from uvim_fsq.checkpoints.run_directory import find_oracle, parse_config, resolve_checkpoint

    checkpoint = resolve_checkpoint(args.run)
    trained = parse_config(checkpoint)[0]
    if not isinstance(trained, LMRun):
        raise UserError(f"{args.run} is of stage {trained.stage}; give the run of an LM")
    split = _split(checkpoint, args.split, trained)
    asked = parse_config(checkpoint, ["train.steps=null", "train.epochs=null", *args.overrides])[0]
    settings = [
        f"oracle={_text(find_oracle(checkpoint, trained))}",
        f"decoder_tuning.run={_text(checkpoint)}",
        "init_from=",
        "model.decoder=trained",
        f"loss.task_weight={trained.loss.task_weight or 1.0}",
        f"data.train_split={_text(split)}",
        f"data.selection_split={_text(_selection_split(split, trained))}",
        f"train.out={_text(_new_run(args.run))}",
        *_shorter(trained, asked.train),
        *args.overrides,
    ]
    new = parse_config(checkpoint, settings)[0]
    if not isinstance(new, LMRun) or new.decoder_tuning.run != str(checkpoint):
        raise UserError(f"decoder_tuning.run is the LM that the command is given, {args.run}; leave this key out")
    _refuse_other_images(split, new)
    say_next_of_predictor(train_run(new, args.run))


def _text(value: str | Path) -> str:
    """A value for `key=value` that stays what it is, whatever YAML would make of it."""
    return json.dumps(str(value), ensure_ascii=False)


def _split(checkpoint: Path, asked: str | None, trained: LMRun) -> str:
    """The split to train on. The images of training are allowed if asked for: augmentation makes them new ones."""
    from uvim_fsq.checkpoints.tuned import tuning_split

    if asked is not None and asked in ("train", trained.data.train_split):
        return asked
    return tuning_split(checkpoint, (), asked, remedy=REMEDY)


def _selection_split(split: str, trained: LMRun) -> str:
    """The LM's hold-out, if the decoder is trained on other images (then `tune` can use it); else none."""
    from uvim_fsq.data.splits import share_images

    held_out = trained.data.selection_split
    return "" if not held_out or share_images(split, held_out) else held_out


def _refuse_other_images(split: str, new: Run) -> None:
    """Raises UserError if overrides name other images to train on, or report those that are trained on."""
    from uvim_fsq.data.splits import share_images

    if new.data.train_split != split:
        raise UserError(f"data.train_split={new.data.train_split}: name the images to train on with --split instead")
    if share_images(split, new.data.eval_split):
        raise UserError(
            f"data.eval_split={new.data.eval_split} is reported, but the decoder would be trained on its images "
            f"(split {split}); report another split, or name another one with --split"
        )


def _new_run(run: str) -> Path:
    """RUN_decoder, beside the run or the run of the checkpoint."""
    from uvim_fsq.checkpoints.hub import results_folder

    place = results_folder(run).absolute()
    place = place.parent.parent if place.parent.name == "checkpoints" else place
    return place.with_name(f"{place.name}_decoder")


def _shorter(trained: LMRun, asked: TrainConfig) -> list[str]:
    """The length and the rate of the new training: a tenth of the steps or epochs, half the rate, no weight decay.

    Args:
        trained: the LM's configuration.
        asked: its training section with the overrides, and without `steps` and `epochs` unless they override them.
    """
    steps, epochs = asked.steps, asked.epochs
    if steps is None and epochs is None and trained.train.steps is not None:
        steps = max(1, round(trained.train.steps * SHARE))
    elif steps is None and epochs is None:
        epochs = (trained.train.epochs or 0) * SHARE
    length = [
        f"train.steps={_null(steps)}",
        f"train.epochs={_null(epochs)}",
        f"optim.warmup_steps={(steps or 0) // 10}",
    ]
    rest = ["train.resume=no", "train.eval_every=null", "train.save_every=null", "optim.weight_decay=0"]
    return [*length, *rest, f"optim.lr={trained.optim.lr / 2}"]


def _null(value: float | None) -> str:
    return "null" if value is None else str(value)
