"""Tokens and periodic evaluation in float32, whatever the training precision."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.support.small import TASKS, lm_run, random_batch
from uvim_fsq.config.schema import EvalConfig, LMRun
from uvim_fsq.data.sample import Batch
from uvim_fsq.evaluation.run import evaluate
from uvim_fsq.inference.predictions import eval_autocast, lm_predictions, oracle_predictions
from uvim_fsq.training import stages
from uvim_fsq.training.loop import Trainer
from uvim_fsq.training.run import train
from uvim_fsq.training.stages import LMStage

CPU = torch.device("cpu")


BF16 = EvalConfig(precision="bf16")


def large_batch(count: int = 200) -> Batch:
    """So many examples that some tokens differ in bf16."""
    labels, image = random_batch(TASKS["depth"], count)
    return Batch(image=image, labels=labels, index=torch.arange(count), id=[str(i) for i in range(count)])


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["eager", "compiled"])
def test_tokens_of_training_equal_those_of_evaluation(
    compile: bool, tmp_path: Path, oracle_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_graph = functools.partial(torch.compile, fullgraph=True, dynamic=False, backend="aot_eager")
    monkeypatch.setattr(stages, "compiled", one_graph)
    run = lm_run(tmp_path / "lm", oracle_dir, "train.precision=bf16", f"train.compile={compile}".lower())
    assert isinstance(run, LMRun)
    stage, batch = LMStage(run), large_batch()
    trainer, seen = Trainer(stage, run), []

    class Recorder(nn.Module):
        def forward(self, image: torch.Tensor, tokens: torch.Tensor, _: object) -> tuple[torch.Tensor, dict]:
            seen.append(tokens)
            return torch.zeros(len(tokens)), {}

    with trainer.accelerator.autocast():
        stage.step(Recorder(), batch)
        low = stage.oracle.quantizer(stage.oracle.encode(batch["labels"], batch["image"])).indices
    exact = stage.oracle.tokenize(batch["labels"], batch["image"])
    assert torch.equal(seen[0], exact)
    assert not torch.equal(low, exact)  # else this would test nothing
    for config in (EvalConfig(), BF16):
        with torch.inference_mode(), eval_autocast(config, CPU):
            tokens = oracle_predictions(stage.oracle, stage.task)(batch).tokens
        assert tokens is not None and torch.equal(tokens, exact)


def test_log_probabilities_are_those_of_float32_tokens(tmp_path: Path, oracle_dir: Path) -> None:
    run = lm_run(tmp_path / "lm", oracle_dir)
    assert isinstance(run, LMRun)
    stage, batch = LMStage(run), large_batch()
    lm: Any = stage.model.eval()
    asked = []
    lm.log_prob = lambda image, tokens: asked.append(tokens) or torch.zeros(tokens.shape)
    with torch.inference_mode(), eval_autocast(BF16, CPU):
        lm_predictions(lm, stage.oracle, stage.task, BF16)(batch)
    assert torch.equal(asked[0], stage.oracle.tokenize(batch["labels"], batch["image"]))


@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.slow), "bf16"])
@pytest.mark.parametrize("ema", [pytest.param("null", marks=pytest.mark.slow), "0.5"])
def test_periodic_evaluation_gives_the_figures_of_the_evaluate_command(
    precision: str, ema: str, tmp_path: Path, oracle_dir: Path
) -> None:
    keys = ["train.precision=bf16", f"train.ema={ema}", f"eval.precision={precision}", "optim.lr=0.01"]
    out = train(lm_run(tmp_path / "lm", oracle_dir, *keys, "train.steps=12"))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    periodic = [line for line in lines if any("bits_per_token" in key for key in line)][-1]
    periodic = {key.rpartition("/")[2]: value for key, value in periodic.items()}
    figures = evaluate(out / "checkpoints" / "step_00000012")["figures"]["lm"]
    assert len(figures) > 5 and {key: periodic[key] for key in figures} == figures
