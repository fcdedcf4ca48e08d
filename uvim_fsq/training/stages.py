"""The two stages as small objects that the one training loop drives. They know tasks by their contract only.

A stage is no nn.Module: the model it trains is `stage.model`; stage II's frozen oracle is a plain attribute that no
optimizer, wrapper or checkpoint ever sees. B batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from uvim_fsq.checkpoints.files import copy_checkpoint
from uvim_fsq.checkpoints.loading import build_lm, build_oracle, build_task, load_oracle
from uvim_fsq.checkpoints.run_directory import oracle_to_train_on, weights_hash
from uvim_fsq.compilation import compiled
from uvim_fsq.config.schema import DataConfig, LMRun, OracleRun, Run
from uvim_fsq.data.sample import Batch
from uvim_fsq.evaluation.evaluator import Evaluator
from uvim_fsq.inference.predictions import PredictFn, lm_predictions, oracle_predictions
from uvim_fsq.lm.base import TokenModel
from uvim_fsq.oracle.model import Oracle
from uvim_fsq.oracle.quantizers.base import Quantizer
from uvim_fsq.reports.panels import panel_picture
from uvim_fsq.tasks.base import Task
from uvim_fsq.training.optim import build_optimizer

Logs = dict[str, torch.Tensor]
Reduce = Callable[[torch.Tensor], torch.Tensor]
#: The optimizer of `stage.model`; other names belong to optimizers of auxiliary modules.
MAIN = "model"


def selection_data(data: DataConfig) -> DataConfig:
    """The data as training evaluates on them: `data.selection_split`, if there is one."""
    return replace(data, eval_split=data.selection_split or data.eval_split)


class Stage(ABC):
    """What the training loop needs of a stage.

    Attributes:
        model: what is trained, saved and evaluated.
        auxiliary: name -> modules that only training needs, such as a discriminator. They are saved for resuming, in
            the trainer's state, and are no part of the result.
        task: the task of the labels.
        oracle_sha256: of the frozen oracle's weights, if there is one and it came from a file.
    """

    name: ClassVar[str]
    model: nn.Module
    auxiliary: dict[str, nn.Module]
    task: Task
    oracle_sha256: str | None = None

    def __init__(self, run: Run) -> None:
        self.run = run
        self.auxiliary = {}

    def build_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Name -> optimizer of what the stage trains; the first is that of `model`, under the name `MAIN`."""
        return {MAIN: build_optimizer(self.model, self.run.optim, self.run.stage)}

    @abstractmethod
    def step(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, Logs]:
        """The mean loss of a micro batch and its scalar logs, all on the device.

        Args:
            model: `self.model`, perhaps wrapped; to be called, so that wrappers work.
        """

    def steps(
        self, model: nn.Module, auxiliary: Mapping[str, nn.Module], batch: Batch
    ) -> Iterator[tuple[str, torch.Tensor, Logs]]:
        """One (optimizer's name, loss, logs) for each optimizer; each loss is backpropagated before the next is asked
        for, and changes only the gradients of that optimizer's parameters.

        A stage with several optimizers overrides this. Where a loss passes through another optimizer's module, call
        the plain module (`self.auxiliary`), and the wrapped one (`auxiliary`) only for its own loss: a wrapper expects
        gradients after each of its forward passes.
        """
        yield MAIN, *self.step(model, batch)

    def on_optimizer_step(self, reduce: Reduce, seed: int) -> None:
        """Called once per optimizer step.

        Args:
            reduce: sums a tensor over all processes.
            seed: for random choices; the same in all processes.
        """

    @abstractmethod
    def train_flops(self) -> float:
        """Floating-point operations of a training step, per image."""

    @abstractmethod
    def predictions(self, model: nn.Module, device: torch.device) -> PredictFn:
        """How the stage predicts, with everything that takes part on the device."""

    @property
    @abstractmethod
    def quantizer(self) -> Quantizer:
        """The oracle's."""

    def evaluate(self, model: nn.Module, limit: int | None, device: torch.device) -> dict[str, float]:
        """The task's metric and the codebook's use over the selection split, or its first `limit` images."""
        evaluator = Evaluator(
            self.task, selection_data(self.run.data), self.run.eval, limit=limit, quantizer=self.quantizer
        )
        return evaluator.run(self.predictions(model, device), device)

    def panel(self, model: nn.Module, device: torch.device) -> np.ndarray:
        """A picture (H, W, 3) uint8 of a few evaluation images: input, prediction, truth, error."""
        return panel_picture(self.task, selection_data(self.run.data), self.predictions(model, device), device)

    def write_artifacts(self, out: Path) -> None:
        """Writes what the run directory holds besides checkpoints; nothing by default."""


class OracleStage(Stage):
    """Stage I: reconstruct the labels through the tokens."""

    name = "oracle"

    def __init__(self, run: OracleRun) -> None:
        super().__init__(run)
        self.task = build_task(run)
        torch.manual_seed(run.train.seed)
        self.oracle = build_oracle(run, self.task)
        self.model = self.oracle
        # Found once: without it no whole logit maps are made.
        self.image_loss = self.task.image_loss if type(self.task).image_loss is not Task.image_loss else None

    def step(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, Logs]:
        """The task's loss, and the quantizer's auxiliary one if it has one."""
        out = model(batch["labels"], batch["image"], self.task.loss, self.image_loss)
        self.quantizer.accumulate(out.bottleneck, out.tokens)
        return out.loss.mean(), {name: value.mean() for name, value in out.logs.items()}

    def on_optimizer_step(self, reduce: Reduce, seed: int) -> None:
        self.quantizer.on_optimizer_step(reduce, seed)

    def train_flops(self) -> float:
        return self.oracle.cost().train

    def predictions(self, model: nn.Module, device: torch.device) -> PredictFn:
        assert isinstance(model, Oracle)
        return oracle_predictions(model, self.task)

    @property
    def quantizer(self) -> Quantizer:
        return self.oracle.quantizer


class LMStage(Stage):
    """Stage II: predict the frozen oracle's tokens from the image.

    `oracle_sha256`: of the oracle's weights; None for an oracle that came from no file.
    """

    name = "lm"

    def __init__(self, run: LMRun, oracle: tuple[Oracle, Task] | None = None) -> None:
        """`oracle`: a frozen oracle and its task, in place of the checkpoint that `run` names."""
        super().__init__(run)
        # Found once: the oracle's best checkpoint may have changed by the time it is copied.
        self.oracle_dir = oracle_to_train_on(run) if oracle is None else None
        self.oracle_sha256 = weights_hash(self.oracle_dir) if self.oracle_dir is not None else None
        self.oracle, self.task = oracle or load_oracle(self.oracle_dir or run.oracle, run)
        self.tokenize = compiled(self.oracle.tokenize) if run.train.compile else self.oracle.tokenize
        torch.manual_seed(run.train.seed)
        self.lm = build_lm(run, self.oracle)
        self.model = self.lm

    def step(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, Logs]:
        """The token model's loss against the oracle's tokens."""
        if next(self.oracle.parameters()).device != batch["image"].device:
            self.oracle.to(batch["image"].device)
        with torch.no_grad():
            tokens = self.tokenize(batch["labels"], batch["image"])
        loss, logs = model(batch["image"], tokens)
        return loss.mean(), {name: value.mean() for name, value in logs.items()}

    def train_flops(self) -> float:
        return self.lm.cost().train + self.oracle.cost().tokenize

    def predictions(self, model: nn.Module, device: torch.device) -> PredictFn:
        assert isinstance(model, TokenModel)
        return lm_predictions(model, self.oracle.to(device), self.task, self.run.eval)

    @property
    def quantizer(self) -> Quantizer:
        return self.oracle.quantizer

    def write_artifacts(self, out: Path) -> None:
        """Copies the oracle's configuration and weights to `out`/oracle, so that the LM's run can be moved alone."""
        if self.oracle_dir is not None:
            copy_checkpoint(self.oracle_dir, out / "oracle")


def build_stage(run: Run) -> Stage:
    """The stage that a resolved configuration asks for; weights are drawn from `train.seed`."""
    return OracleStage(run) if isinstance(run, OracleRun) else LMStage(run)
