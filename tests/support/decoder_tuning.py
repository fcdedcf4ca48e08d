"""Runs that train the decoder of a trained LM."""

from __future__ import annotations

from pathlib import Path

from uvim_fsq.checkpoints.ancestors import inherit
from uvim_fsq.checkpoints.run_directory import checkpoints, parse_config
from uvim_fsq.config.schema import LMRun
from uvim_fsq.training.stages import DecoderTuningStage, build_stage


def tuning_run(out: Path, lm: Path, *settings: str) -> LMRun:
    """A configuration like that of `uvim-fsq tune-decoder`, for the last checkpoint of an LM's run."""
    checkpoint = checkpoints(lm)[-1]
    own = [f"oracle={lm / 'oracle'}", f"decoder_tuning.run={checkpoint}", "model.decoder=trained"]
    own += ["loss.task_weight=1", f"train.out={out}", "train.resume=no", *settings]
    run = inherit(parse_config(checkpoint, own)[0])
    assert isinstance(run, LMRun)
    return run


def tuning_stage(run: LMRun) -> DecoderTuningStage:
    stage = build_stage(run)
    assert isinstance(stage, DecoderTuningStage)
    return stage
