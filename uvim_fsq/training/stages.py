"""The two stages as small objects that the one training loop drives. They know tasks by their contract only.

A stage is no nn.Module: the model it trains is `stage.model`; stage II's frozen oracle is a plain attribute that no
optimizer, wrapper or checkpoint ever sees.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from uvim_fsq.benchmark.floors import OracleCost, lm_cost, oracle_cost
from uvim_fsq.compilation import compiled
from uvim_fsq.config import DataConfig, LMRun, OracleRun, Run
from uvim_fsq.data.sample import Batch
from uvim_fsq.evaluation import Evaluator, lm_predictions, oracle_predictions
from uvim_fsq.lm.model import LM
from uvim_fsq.models import build_lm, build_oracle, build_task, load_oracle
from uvim_fsq.oracle.model import Oracle
from uvim_fsq.oracle.vq import VQ
from uvim_fsq.report import panel_picture
from uvim_fsq.run_dirs import oracle_to_train_on, weights_hash
from uvim_fsq.tasks.base import Task
from uvim_fsq.training.checkpoint import copy_checkpoint

Logs = dict[str, torch.Tensor]
Reduce = Callable[[torch.Tensor], torch.Tensor]


def cost_of(oracle: Oracle, task: Task) -> OracleCost:
    """FLOP of an oracle's pieces, per image."""
    return oracle_cost(oracle.config, task.label_channels, oracle.image_size, oracle.quantizer.dim)


def watched(data: DataConfig) -> DataConfig:
    """The data as training evaluates on them."""
    return replace(data, eval_split=data.watch_split or data.eval_split)


class OracleStage:
    """Stage I: reconstruct the labels through the tokens."""

    main_prefix = "oracle"
    oracle_sha256 = None

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

    def train_flops(self) -> float:
        """Floating-point operations of a training step, per image."""
        assert isinstance(self.model, Oracle)
        return cost_of(self.model, self.task).train

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
    """Stage II: predict the frozen oracle's tokens from the image.

    `oracle_sha256`: of the oracle's weights; None for an oracle that came from no file.
    """

    main_prefix = "lm"

    def __init__(self, run: LMRun, oracle: tuple[Oracle, Task] | None = None) -> None:
        """`oracle`: a frozen oracle and its task, in place of the checkpoint that `run` names."""
        self.run = run
        # Found once: the oracle's best checkpoint may be another one by the time that it is copied.
        self.oracle_dir = oracle_to_train_on(run) if oracle is None else None
        self.oracle_sha256 = weights_hash(self.oracle_dir) if self.oracle_dir is not None else None
        self.oracle, self.task = oracle or load_oracle(self.oracle_dir or run.oracle, run)
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

    def train_flops(self) -> float:
        """Floating-point operations of a training step, per image, the frozen oracle's included."""
        assert isinstance(self.model, LM)
        return lm_cost(self.model).train + cost_of(self.oracle, self.task).tokenize

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
        if self.oracle_dir is not None:
            copy_checkpoint(self.oracle_dir, out / "oracle")


Stage = OracleStage | LMStage


def build_stage(run: Run) -> Stage:
    """The stage that a resolved configuration asks for; weights are drawn from `train.seed`."""
    return OracleStage(run) if isinstance(run, OracleRun) else LMStage(run)
