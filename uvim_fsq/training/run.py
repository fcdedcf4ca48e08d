"""From a resolved configuration to a trained run directory, for both stages."""

from __future__ import annotations

from pathlib import Path

from uvim_fsq import processes
from uvim_fsq.config import Run
from uvim_fsq.evaluation import evaluate_run
from uvim_fsq.files import write_json
from uvim_fsq.memory import TRAINING, enough_memory
from uvim_fsq.models import build_task, resolve
from uvim_fsq.results import result_file
from uvim_fsq.tasks.contract import refuse_faults
from uvim_fsq.training.loop import fit
from uvim_fsq.training.stages import build_stage


def train(run: Run) -> Path:
    """Trains a stage, evaluates its best or last checkpoint (see `data.watch_split`), writes RUN/evaluation.json.

    Returns the run directory. Raises UserError for whatever the user can put right.
    """
    # Before the data are read, which takes time.
    processes.state()
    run = resolve(run)
    with enough_memory(TRAINING):
        refuse_faults(build_task(run), run.data.root, run.data.eval_split)
        out = fit(build_stage(run), run)
    result = evaluate_run(out)
    if processes.is_main():
        write_json(result_file(out), result)
    return out
