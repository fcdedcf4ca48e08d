"""The two training stages and the direct baseline, which share one training loop.

They use tasks only through the `Task` interface.

A stage is not an nn.Module. The model it trains is `stage.model`. The frozen oracle of stage II is a plain attribute,
so that no optimizer, wrapper or checkpoint includes it.
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
from torch.nn.functional import one_hot

from uvim_fsq.checkpoints.files import copy_checkpoint
from uvim_fsq.checkpoints.loading import (
    LoadedRun,
    build_direct,
    build_lm,
    build_oracle,
    build_task,
    load_checkpoint,
    load_oracle,
)
from uvim_fsq.checkpoints.run_directory import find_oracle, oracle_to_train_on, weights_hash
from uvim_fsq.compilation import compiled
from uvim_fsq.config.schema import DataConfig, DirectRun, LMRun, OracleRun, Run
from uvim_fsq.data.sample import Batch
from uvim_fsq.direct.model import DirectModel
from uvim_fsq.errors import UserError
from uvim_fsq.evaluation.evaluator import Evaluator
from uvim_fsq.inference.code_decoding import build_generator, distributions
from uvim_fsq.inference.predictions import PredictFn, direct_predictions, lm_predictions, oracle_predictions
from uvim_fsq.lm.base import CodeLoss, Generated, Generator, TokenModel
from uvim_fsq.lm.sampling import Sampling
from uvim_fsq.oracle.label_head import Loss
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
    """The data that training evaluates on: `data.selection_split` if set, else `data.eval_split`."""
    return replace(data, eval_split=data.selection_split or data.eval_split)


class Stage(ABC):
    """The interface between a stage and the training loop.

    Attributes:
        model: the model that is trained, saved and evaluated.
        auxiliary: name -> module that only training needs, such as a discriminator. The trainer's state includes them,
            so that training can resume, but they are not part of the result.
        task: the task of the labels.
        oracle_sha256: SHA-256 of the frozen oracle's weights; None without an oracle or if it was not loaded from a
            file.
    """

    name: ClassVar[str]
    model: nn.Module
    auxiliary: dict[str, nn.Module]
    task: Task
    oracle_sha256: str | None = None

    def __init__(self, run: Run) -> None:
        self.run = run
        self.auxiliary = {}

    @property
    def quantizer(self) -> Quantizer | None:
        """The quantizer of the stage's tokens; None if it has no tokens."""
        return None

    @property
    def image_loss(self) -> Loss | None:
        """The task's image-level loss; None unless the task has one, because it requires logits of whole label maps."""
        return self.task.image_loss if self.task.has_image_loss else None

    def build_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Name -> optimizer. The first is the optimizer of `model`, under the name `MAIN`."""
        return {MAIN: build_optimizer(self.model, self.run.optim)}

    @abstractmethod
    def step(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, Logs]:
        """The mean loss of a micro batch, a scalar, and its scalar logs, all on the device.

        Args:
            model: `self.model`, possibly wrapped. It must be used by calling it, so that wrappers work.
            batch: the micro batch, on the device.
        """

    def steps(
        self, model: nn.Module, auxiliary: Mapping[str, nn.Module], batch: Batch
    ) -> Iterator[tuple[str, torch.Tensor, Logs]]:
        """Yields (optimizer name, loss, logs) for each optimizer.

        Each loss is backpropagated before the next one is requested, and only into the parameters of its own optimizer.
        A stage with several optimizers overrides this method. If a loss passes through the module of another optimizer,
        it must call the unwrapped module (`self.auxiliary`). The wrapped one (`auxiliary`) is only for the module's own
        loss, because a wrapper expects gradients after each of its forward passes.
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
        """Floating-point operations of a training step per image."""

    @abstractmethod
    def predictions(self, model: nn.Module, device: torch.device) -> PredictFn:
        """The stage's predict function for `model`, with all modules that take part moved to the device."""

    def evaluate(self, model: nn.Module, limit: int | None, device: torch.device) -> dict[str, float]:
        """The task's metrics, and the usage of the codebook if there is one, on the selection split.

        `limit`: use only the split's first images.
        """
        evaluator = Evaluator(
            self.task, selection_data(self.run.data), self.run.eval, limit=limit, quantizer=self.quantizer
        )
        return evaluator.run(self.predictions(model, device), device)

    def panel(self, model: nn.Module, device: torch.device) -> np.ndarray:
        """A panel (H, W, 3) uint8 of a few evaluation images: input, prediction, ground truth, error."""
        return panel_picture(self.task, selection_data(self.run.data), self.predictions(model, device), device)

    def write_artifacts(self, out: Path) -> None:
        """Writes files other than checkpoints to the run directory; none by default."""


class OracleStage(Stage):
    """Stage I: trains the oracle to reconstruct labels through discrete tokens."""

    name = "oracle"

    def __init__(self, run: OracleRun) -> None:
        super().__init__(run)
        self.task = build_task(run)
        torch.manual_seed(run.train.seed)
        self.oracle = build_oracle(run, self.task)
        self.model = self.oracle

    @property
    def quantizer(self) -> Quantizer:
        return self.oracle.quantizer

    def step(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, Logs]:
        """The task's loss plus the quantizer's auxiliary loss, if any."""
        out = model(batch["labels"], batch["image"], self.task.loss, self.image_loss)
        self.oracle.quantizer.accumulate(out.bottleneck, out.tokens)
        return out.loss.mean(), {name: value.mean() for name, value in out.logs.items()}

    def on_optimizer_step(self, reduce: Reduce, seed: int) -> None:
        self.oracle.quantizer.on_optimizer_step(reduce, seed)

    def train_flops(self) -> float:
        return self.oracle.cost().train

    def predictions(self, model: nn.Module, device: torch.device) -> PredictFn:
        assert isinstance(model, Oracle)
        return oracle_predictions(model, self.task)


class LMStage(Stage):
    """Stage II: trains a token model to predict the frozen oracle's tokens from the image."""

    name = "lm"

    def __init__(self, run: LMRun, oracle: tuple[Oracle, Task] | None = None) -> None:
        """`oracle`: a frozen oracle and its task, to use instead of the checkpoint that `run` names."""
        super().__init__(run)
        self.oracle_dir: Path | None = None
        if oracle is None:
            # Determined once, because the oracle's best checkpoint may change before it is copied.
            self.oracle_dir = oracle_to_train_on(run)
            self.oracle_sha256 = weights_hash(self.oracle_dir)
            oracle = load_oracle(self.oracle_dir, run)
        self.oracle, self.task = oracle
        self.tokenize = compiled(self.oracle.tokenize) if run.train.compile else self.oracle.tokenize
        torch.manual_seed(run.train.seed)
        self.lm = build_lm(run, self.oracle)
        # Now, not at the first evaluation.
        self.lm.check_sampling(Sampling.of(run.eval))
        self.model = self.lm
        self.run: LMRun = run

    @property
    def quantizer(self) -> Quantizer:
        return self.oracle.quantizer

    def step(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, Logs]:
        """The loss of the token model on the oracle's tokens. Raises UserError if it lacks the task loss asked for."""
        loss, logs = model(batch["image"], self.true_tokens(batch), self.code_loss(batch))
        weight = self.run.loss.task_weight
        if weight and "task_loss" not in logs:
            raise UserError(
                f"loss.task_weight={weight}: the logs of token model {type(self.lm).__name__} have no task_loss, "
                "so its `loss` ignores `code_loss`; set the weight to 0, or let the plugin call `total_loss`"
            )
        return loss.mean(), {name: value.mean() for name, value in logs.items()}

    def true_tokens(self, batch: Batch) -> torch.Tensor:
        """The tokens (B, L) int64 of the labels. Moves the oracle to the device of the batch."""
        if next(self.oracle.parameters()).device != batch["image"].device:
            self.oracle.to(batch["image"].device)
        with torch.no_grad():
            return self.tokenize(batch["labels"], batch["image"])

    def code_loss(self, batch: Batch) -> CodeLoss | None:
        """The weighted task loss of soft codes, decoded by the frozen oracle or its trained copy; None at weight 0."""
        weight = self.run.loss.task_weight
        if not weight:
            return None
        decoder = self.lm.label_decoder or self.oracle

        def soft_code_loss(
            probabilities: torch.Tensor, features: torch.Tensor | None
        ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            codes = self.oracle.quantizer.expected_codes(probabilities)
            labels, image = batch["labels"], batch["image"]
            value, logs = decoder.label_loss(codes, labels, image, self.task.loss, self.image_loss, features)
            return weight * value, {"task_loss": value.detach(), **logs}

        return soft_code_loss

    def train_flops(self) -> float:
        oracle = self.oracle.cost()
        # A frozen decoder passes gradients on, but needs none for its weights.
        passes = 2 if self.lm.label_decoder is None else 3
        decode = passes * oracle.decode if self.run.loss.task_weight else 0.0
        return self.lm.cost().train + oracle.tokenize + decode

    def predictions(self, model: nn.Module, device: torch.device) -> PredictFn:
        assert isinstance(model, TokenModel)
        return lm_predictions(model, self.oracle.to(device), self.task, self.run.eval)

    def write_artifacts(self, out: Path) -> None:
        """Copies the oracle's configuration and weights to `out`/oracle, so that the LM's run is self-contained."""
        if self.oracle_dir is not None:
            copy_checkpoint(self.oracle_dir, out / "oracle")


class DecoderTuningStage(LMStage):
    """Stage II with a token model that stays: trains the LM's copy of the oracle's decoder on the tokens it predicts.

    The oracle's decoder has seen only true tokens. Here some are true and the others are predicted, so that it learns
    how far to trust them (the post-training of RobusTok, arXiv 2509.12474). The predictions are those of `run.eval`.
    """

    def __init__(self, run: LMRun) -> None:
        """Raises UserError if `decoder_tuning.run` is no LM, or has another token model or oracle than `run`."""
        encoder = replace(run.model.encoder, weights="none")
        super().__init__(replace(run, model=replace(run.model, encoder=encoder)))
        kept = load_checkpoint(run.decoder_tuning.run, tuned=False)
        self._refuse_other(run, kept)
        assert kept.lm is not None and self.lm.label_decoder is not None
        self.lm.load_state_dict({**self.lm.state_dict(), **kept.lm.state_dict()})
        self.lm.requires_grad_(False)
        self.lm.label_decoder.requires_grad_(True)
        self._generator: Generator | None = None

    def _refuse_other(self, run: LMRun, kept: LoadedRun) -> None:
        place = run.decoder_tuning.run
        if not isinstance(kept.run, LMRun):
            raise UserError(f"decoder_tuning.run={place} is of stage {kept.run.stage}; give the run of an LM")
        context = run.model.decoder_context
        if kept.run.model.decoder == "trained" and kept.run.model.decoder_context != context:
            raise UserError(
                f"{place} has a trained decoder with model.decoder_context={kept.run.model.decoder_context}, which "
                "cannot change; leave it as it was"
            )
        if replace(kept.run.model, decoder="trained", decoder_context=context) != run.model:
            raise UserError(f"{place} has another token model; leave model.* as it was, except for decoder_context")
        if weights_hash(find_oracle(kept.checkpoint, kept.run)) != self.oracle_sha256:
            raise UserError(f"{place} was trained on another oracle than oracle={run.oracle}; leave oracle= out")

    def step(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, Logs]:
        """The task's loss of labels decoded from mixtures of true and predicted codes."""
        tokens = self.true_tokens(batch)
        loss, logs = model(batch["image"], tokens, self.code_loss(batch), self.mixture(batch["image"], tokens))
        return loss.mean(), {name: value.mean() for name, value in logs.items()}

    def mixture(self, image: torch.Tensor, tokens: torch.Tensor) -> Generated:
        """What the LM predicts for images (B, 3, S, S), with `true_share` of the tokens replaced by the true ones.

        The distributions of true tokens, and with `eval.codes: hard` of all tokens, have a single value of 1.
        """
        # The loop has put the model into training mode, where a token model drops units and norms see the batch.
        self.lm.eval()
        if self._generator is None:
            self._generator = build_generator(self.lm, self.run.eval)
        generated = self._generator(image, torch.randint(2**31, (len(image),)))
        true = torch.rand(tokens.shape, device=tokens.device) < self.run.decoder_tuning.true_share
        chosen = torch.where(true, tokens, generated.tokens)
        certain = one_hot(chosen, self.lm.vocab_size).float()
        probabilities = certain
        if self.run.eval.codes == "soft":
            probabilities = torch.where(true.unsqueeze(-1), certain, distributions(generated))
        # A copy, because what was computed in inference mode cannot be saved for the backward pass.
        features = generated.features
        if features is not None:
            features = features.to(torch.float32, copy=True)
        return Generated(chosen, probabilities, features)

    def train_flops(self) -> float:
        oracle = self.oracle.cost()
        # Prediction needs a forward pass of the token model, a third of its training.
        return self.lm.cost().train / 3 + oracle.tokenize + 3 * oracle.decode


class DirectStage(Stage):
    """The direct baseline: trains an image encoder with a label head on the task's loss."""

    name = "direct"

    def __init__(self, run: DirectRun) -> None:
        super().__init__(run)
        self.task = build_task(run)
        torch.manual_seed(run.train.seed)
        self.direct = build_direct(run, self.task)
        self.model = self.direct

    def step(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, Logs]:
        """The task's loss."""
        loss, logs = model(batch["labels"], batch["image"], self.task.loss, self.image_loss)
        return loss.mean(), {name: value.mean() for name, value in logs.items()}

    def train_flops(self) -> float:
        return self.direct.cost().train

    def predictions(self, model: nn.Module, device: torch.device) -> PredictFn:
        assert isinstance(model, DirectModel)
        return direct_predictions(model, self.task)


def build_stage(run: Run) -> Stage:
    """Builds the stage of a resolved configuration. Weights are initialized with `train.seed`."""
    if isinstance(run, OracleRun):
        return OracleStage(run)
    if isinstance(run, LMRun):
        return DecoderTuningStage(run) if run.decoder_tuning.run else LMStage(run)
    return DirectStage(run)
