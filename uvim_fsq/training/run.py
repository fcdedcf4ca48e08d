"""Trains a stage from a configuration and evaluates the result."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from uvim_fsq import processes
from uvim_fsq.checkpoints.loading import build_task, resolve_task
from uvim_fsq.checkpoints.run_directory import inherit
from uvim_fsq.compilation import compiler_unloaded
from uvim_fsq.config.schema import Run
from uvim_fsq.errors import TRAINING_REMEDY, UserError, enough_memory
from uvim_fsq.evaluation.results import result_file, states_file
from uvim_fsq.evaluation.run import evaluate
from uvim_fsq.files import write_json
from uvim_fsq.tasks.configuration import load_run
from uvim_fsq.tasks.contract import refuse_faults
from uvim_fsq.training.loop import fit
from uvim_fsq.training.stages import build_stage
from uvim_fsq.training.trackers import check_trackers


def train(config: str | Path | Run, overrides: Sequence[str] = ()) -> Path:
    """Trains the stage that a configuration names, evaluates the result and writes RUN/evaluation.json.

    The best checkpoint on `data.selection_split` is evaluated if that is set, else the last one.

    Args:
        config: a YAML file, the name of a shipped configuration such as "nyu_depth/oracle", or a loaded `Run`.
        overrides: `key=value` strings, e.g. "train.out=runs/depth_oracle"; only with a file or a name.

    Returns the run directory. Raises UserError for problems that the user can fix.
    """
    if isinstance(config, (str, Path)):
        config = load_run(config, overrides)
    elif overrides:
        raise UserError("train takes overrides only with a file or a name; a loaded run already has its settings")
    return train_inherited(inherit(config))


def train_inherited(run: Run) -> Path:
    """Like `train`, for a configuration that `inherit` has already completed and checked."""
    check_trackers(run.train)
    # Set up the process group first, because reading the data takes time.
    processes.state()
    run = resolve_task(run)
    with enough_memory(TRAINING_REMEDY), compiler_unloaded():
        refuse_faults(build_task(run), run.data.root, run.data.eval_split)
        out = fit(build_stage(run), run)
    result = evaluate(out, tuned=False, states=states_file(result_file(out)))
    if processes.is_main():
        write_json(result_file(out), result)
    return out
