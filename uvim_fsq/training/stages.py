"""The two stages as small objects that the one training loop drives. They know tasks by their contract only.

A stage is no nn.Module: the model it trains is `stage.model`; stage II's frozen oracle is a plain attribute that no
optimizer, wrapper or checkpoint ever sees.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from uvim_fsq.config import DataConfig, LMRun, OracleRun, Run
from uvim_fsq.data.sample import Batch
from uvim_fsq.evaluation import Evaluator, lm_predictions, oracle_predictions
from uvim_fsq.lm.model import LM
from uvim_fsq.models import build_lm, build_oracle, build_task, load_oracle
from uvim_fsq.oracle.model import Oracle
from uvim_fsq.oracle.vq import VQ
from uvim_fsq.report import panel_picture
from uvim_fsq.training.checkpoint import copy_checkpoint, resolve_checkpoint

Logs = dict[str, torch.Tensor]
Reduce = Callable[[torch.Tensor], torch.Tensor]
Compilable = TypeVar("Compilable", bound=Callable[..., Any])


def compiled(function: Compilable) -> Compilable:
    """`torch.compile` as this project uses it: one graph per batch size, of which there are at most two."""
    # Splitting the graph for DistributedDataParallel, to overlap communication, has failed with recomputed parts, which
    # the label head has (pytorch issue 104674).
    torch._dynamo.config.optimize_ddp = False
    return torch.compile(function, dynamic=False)  # type: ignore[return-value]


def watched(data: DataConfig) -> DataConfig:
    """The data as training evaluates on them."""
    return replace(data, eval_split=data.watch_split or data.eval_split)


class OracleStage:
    """Stage I: reconstruct the labels through the tokens."""

    main_prefix = "oracle"

    def __init__(self, run: OracleRun) -> None:
        self.run, self.task = run, build_task(run)
        torch.manual_seed(run.train.seed)
        oracle = build_oracle(run, self.task)
        self.dictionary = oracle.quantizer if isinstance(oracle.quantizer, VQ) else None
        self.model: nn.Module = oracle

    def step(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, Logs]:
        """Mean task loss of a micro batch and its scalar logs, all on the device. `model` may be wrapped."""
        out = model(batch["labels"], batch["image"], self.task.loss)
        if self.dictionary is not None:
            self.dictionary.observe(out.bottleneck, out.tokens)
        return out.loss.mean(), {name: value.mean() for name, value in out.logs.items()}

    def after_step(self, reduce: Reduce, seed: int) -> None:
        """Once per optimizer step: `reduce` sums over processes, `seed` is the same in all of them."""
        if self.dictionary is not None:
            self.dictionary.update(reduce, seed)

    def evaluate(self, model: nn.Module, limit: int | None, device: torch.device) -> dict[str, float]:
        """The task's metric and the codebook's use over the evaluation split."""
        assert isinstance(model, Oracle)
        evaluator = Evaluator(self.task, watched(self.run.data), self.run.eval, limit=limit, quantizer=model.quantizer)
        return evaluator.run(oracle_predictions(model, self.task), device)

    def panel(self, model: nn.Module, device: torch.device) -> np.ndarray:
        """A picture (H, W, 3) uint8 of a few evaluation images: input, prediction, truth, error."""
        assert isinstance(model, Oracle)
        return panel_picture(self.task, watched(self.run.data), oracle_predictions(model, self.task), device)

    def extra_files(self, out: Path) -> None:
        """Nothing beside the checkpoint."""


class LMStage:
    """Stage II: predict the frozen oracle's tokens from the image."""

    main_prefix = "lm"

    def __init__(self, run: LMRun) -> None:
        self.run = run
        self.oracle_dir = resolve_checkpoint(run.oracle)
        self.oracle, self.task = load_oracle(self.oracle_dir, run)
        self.tokenize = compiled(self.oracle.tokenize) if run.train.compile else self.oracle.tokenize
        torch.manual_seed(run.train.seed)
        self.model: nn.Module = build_lm(run, self.oracle)

    def step(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, Logs]:
        """Mean cross-entropy over the tokens, and the share of tokens whose argmax is right."""
        if next(self.oracle.parameters()).device != batch["image"].device:
            self.oracle.to(batch["image"].device)
        with torch.no_grad():
            tokens = self.tokenize(batch["labels"], batch["image"])
        logits = model(batch["image"], tokens)
        loss = F.cross_entropy(logits.float().flatten(0, 1), tokens.flatten())
        return loss, {"token_accuracy": (logits.argmax(-1) == tokens).float().mean()}

    def after_step(self, reduce: Reduce, seed: int) -> None:
        """Nothing: all of the model is trained by gradients."""

    def evaluate(self, model: nn.Module, limit: int | None, device: torch.device) -> dict[str, float]:
        """The task's metric over the evaluation split, decoding from the image alone."""
        assert isinstance(model, LM)
        self.oracle.to(device)
        evaluator = Evaluator(
            self.task, watched(self.run.data), self.run.eval, limit=limit, quantizer=self.oracle.quantizer
        )
        return evaluator.run(lm_predictions(model, self.oracle, self.task, self.run.eval), device)

    def panel(self, model: nn.Module, device: torch.device) -> np.ndarray:
        """A picture (H, W, 3) uint8 of a few evaluation images: input, prediction, truth, error."""
        assert isinstance(model, LM)
        self.oracle.to(device)
        predictions = lm_predictions(model, self.oracle, self.task, self.run.eval)
        return panel_picture(self.task, watched(self.run.data), predictions, device)

    def extra_files(self, out: Path) -> None:
        """Copies the oracle's configuration and weights to `out`/oracle, so that the LM's run can be moved alone."""
        copy_checkpoint(self.oracle_dir, out / "oracle")


Stage = OracleStage | LMStage


def build_stage(run: Run) -> Stage:
    """The stage that a resolved configuration asks for; weights are drawn from `train.seed`."""
    return OracleStage(run) if isinstance(run, OracleRun) else LMStage(run)
