"""Training with torch.compile: equal losses, resumption, ordinary checkpoints."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.support.compiler import needs_compiler
from tests.support.runs import last_weights, losses
from tests.support.small import stage_run
from uvim_fsq.checkpoints import files as ckpt
from uvim_fsq.checkpoints.loading import load_any
from uvim_fsq.training import stages, step
from uvim_fsq.training.loop import fit
from uvim_fsq.training.stages import build_stage

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

#: Dynamo and autograd's tracing without the C++ compiler, which takes a minute a model; a graph break is an error.
one_graph = functools.partial(torch.compile, fullgraph=True, dynamic=False, backend="aot_eager")


def _train_compiled(stage: str, tmp_path: Path, data: Path, oracle_dir: Path, precision: str) -> None:
    """Losses as without compilation, ordinary names of weights, resumption, evaluation and averaged weights."""
    keys = [f"train.precision={precision}", "train.ema=0.9", "train.save_every=3", "train.accumulate=2"]
    # Compiled code draws other random numbers.
    keys += {"oracle": ["model.code_dropout=none"], "masked": ["model.mask_floor=1"]}.get(stage, [])
    eager, whole, halves = (
        stage_run(stage, tmp_path / n, data, oracle_dir, *keys) for n in ("eager", "whole", "halves")
    )
    fit(build_stage(eager), eager)
    for run in (whole, halves):
        run = replace(run, train=replace(run.train, compile=True))
        fit(build_stage(run), run)
    for late in ckpt.checkpoints(tmp_path / "halves")[1:]:
        late.rename(tmp_path / late.name)
    again = replace(halves, train=replace(halves.train, compile=True, resume="auto"))
    fit(build_stage(again), again)
    far = 1e-5 if precision == "fp32" else 2e-2
    assert losses(tmp_path / "whole") == pytest.approx(losses(tmp_path / "eager"), abs=far)
    assert losses(tmp_path / "whole") == losses(tmp_path / "halves")
    one, two = last_weights(tmp_path / "whole"), last_weights(tmp_path / "halves")
    assert one.keys() == last_weights(tmp_path / "eager").keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    load_any(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["oracle", "lm", "masked", "direct"])
def test_training_in_one_graph_equals_eager_training(
    stage: str, tmp_path: Path, data: Path, oracle_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (step, stages):
        monkeypatch.setattr(module, "compiled", one_graph)
    _train_compiled(stage, tmp_path, data, oracle_dir, "fp32")


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("stage", ["oracle", "lm"])
def test_compiled_training_equals_eager_training(stage: str, tmp_path: Path, data: Path, oracle_dir: Path) -> None:
    _train_compiled(stage, tmp_path, data, oracle_dir, "bf16")
