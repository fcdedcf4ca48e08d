"""The interface of token models (stage II) and the registry that finds them by name.

A token model predicts the oracle's tokens from the image. Training, evaluation, prediction and the benchmark use only
this interface. They do not depend on how a model orders or masks its tokens.

B batch, S image side, L code length, V vocabulary (the oracle's codebook size).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol, TypeVar, runtime_checkable

import torch
from torch import nn

from uvim_fsq.config.registry import Registry
from uvim_fsq.config.rules import refuse_steps
from uvim_fsq.config.schema import LMModelConfig
from uvim_fsq.errors import UserError
from uvim_fsq.lm.sampling import GREEDY, Sampling
from uvim_fsq.oracle.label_decoder import LabelDecoder
from uvim_fsq.performance.flops import TokenModelCost


@dataclass(frozen=True)
class Generated:
    """Generated tokens.

    Attributes:
        tokens: (B, L) int64 in [0, V).
        probabilities: (B, L, V) float32, the distribution of each token before temperature and top-k or top-p
            filtering, given the tokens that were known when it was chosen; None unless requested.
        features: (B, M, E), the image features that the tokens were predicted from; None if the model has none.
    """

    tokens: torch.Tensor
    probabilities: torch.Tensor | None = None
    features: torch.Tensor | None = None


#: (probabilities (B, L, V) float32, image features (B, M, E) or None) -> loss (B,) float32 and logs name -> (B,).
CodeLoss = Callable[[torch.Tensor, "torch.Tensor | None"], tuple[torch.Tensor, dict[str, torch.Tensor]]]
#: (images (B, 3, S, S), seeds (B,) int64 or None) -> Generated.
Generator = Callable[[torch.Tensor, "torch.Tensor | None"], Generated]


@runtime_checkable
class PureGenerator(Protocol):
    """A generator that can be compiled whole: random numbers are drawn first, the rest is one function of tensors."""

    def draw(self, seeds: torch.Tensor) -> torch.Tensor | None:
        """Random numbers for images with seeds (B,) int64: a tensor of B rows, or None if nothing is random."""
        ...

    def predict(self, images: torch.Tensor, drawn: torch.Tensor | None, copies: int = 1) -> Generated:
        """Generates `copies` samples of each image (B, 3, S, S), the first of all images first.

        `drawn` has copies * B rows. There are no side effects, and the control flow depends on shapes only.
        """
        ...


@runtime_checkable
class SampleGenerator(Protocol):
    """A generator that encodes an image once for several samples of it."""

    def samples(self, images: torch.Tensor, seeds: torch.Tensor | None, copies: int) -> Generated:
        """Generates `copies` samples of each image (B, 3, S, S), the first of all images first.

        `seeds` (copies * B,) int64: one random stream per sample; 0, 1, 2, ... by default.
        """
        ...


class TokenModel(nn.Module, ABC):
    """Predicts L tokens in [0, V) from an image. Images are (B, 3, S, S), either uint8 or floating point in [-1, 1].

    Args:
        config: the architecture.
        image_size: S.
        vocab_size: V.
        length: L.
    """

    #: Whether `generator` supports `int8_cross_kv` and `compile`.
    has_cached_decoding: ClassVar[bool] = False
    #: Whether the model decodes in `Sampling.steps` steps.
    has_steps: ClassVar[bool] = False

    def __init__(self, config: LMModelConfig, *, image_size: int, vocab_size: int, length: int) -> None:
        super().__init__()
        self.config, self.image_size, self.vocab_size, self.length = config, image_size, vocab_size, length
        #: The trained copy of the oracle's decoder (`model.decoder: trained`), saved with the token model; else None.
        self.label_decoder: LabelDecoder | None = None

    @property
    def num_features(self) -> int | None:
        """The width E of the image features that `code_loss` and `Generated` carry; None if there are none."""
        return None

    @abstractmethod
    def loss(
        self, image: torch.Tensor, tokens: torch.Tensor, code_loss: CodeLoss | None = None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The training loss against the true tokens (B, L) int64: (B,) float32 per example, and logs name -> (B,).

        If `code_loss` is given, it is called once with the predicted distributions, and its value and logs are added.
        It lets the labels that the oracle decodes from soft codes be part of the loss. `total_loss` does all of this.
        Training is refused if the logs then lack "task_loss".
        """

    @abstractmethod
    def log_prob(self, image: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Natural log-probability (B, L) float32 of each given token, in the model's own order of prediction."""

    @abstractmethod
    def generate(
        self,
        image: torch.Tensor,
        sampling: Sampling = GREEDY,
        seeds: torch.Tensor | None = None,
        *,
        probabilities: bool = False,
    ) -> Generated:
        """Predicts the tokens of a batch of images. The tokens of an image do not depend on the rest of the batch.

        Args:
            image: (B, 3, S, S).
            sampling: how tokens are chosen; greedy by default.
            seeds: (B,) int64, one random stream per image; 0 to B - 1 by default. Unused by greedy decoding.
            probabilities: also return the distribution of each token.

        Raises UserError for sampling settings that the model does not support, see `check_sampling`.
        """

    @abstractmethod
    def cost(self, steps: int | None = None) -> TokenModelCost:
        """Floating-point operations of training and generation, for the benchmark and for the MFU in training logs.

        Args:
            steps: decoding steps as in `Sampling`, for models that have them.
        """

    @abstractmethod
    def activation_bytes(self, number_bytes: int) -> float:
        """Bytes of activations per image kept for the backward pass, at `number_bytes` bytes per forward activation."""

    def generator(
        self,
        sampling: Sampling = GREEDY,
        *,
        precision: str = "fp32",
        int8_cross_kv: bool = False,
        compile: bool = False,
        probabilities: bool = False,
    ) -> Generator:
        """Returns a function like `generate` for many batches, which may reuse buffers, casts and compiled graphs.

        Args:
            sampling: how tokens are chosen; greedy by default.
            precision: "fp32" or "bf16".
            int8_cross_kv: keep the keys and values of cross-attention in 8 bits.
            compile: use torch.compile.
            probabilities: also return the distribution of each token.

        Raises UserError for options that the model does not support.
        """
        self.check_sampling(sampling)
        if int8_cross_kv or compile:
            raise self.unsupported("int8_cross_kv" if int8_cross_kv else "compile")

        @torch.inference_mode()
        def run(image: torch.Tensor, seeds: torch.Tensor | None = None) -> Generated:
            with torch.autocast(image.device.type, torch.bfloat16, enabled=precision == "bf16"):
                return self.generate(image, sampling, seeds, probabilities=probabilities)

        return run

    def check_sampling(self, sampling: Sampling) -> None:
        """Raises UserError for decoding steps that the model does not have: more than tokens, or any (`has_steps`)."""
        if not self.has_steps:
            refuse_steps(sampling.steps, sampling.choice_temperature, self.config.kind)
        elif sampling.steps is not None and sampling.steps > self.length:
            raise UserError(f"eval.steps={sampling.steps} exceeds the {self.length} tokens of an image; lower it")

    def unsupported(self, key: str) -> UserError:
        """The error for `eval.KEY=true` if the model does not support it."""
        return UserError(f"eval.{key}=true: token model {type(self).__name__} does not support it; set it to false")

    def randomize_head_(self) -> None:
        """Makes an untrained model predict varied tokens, for benchmarks; by default does nothing."""

    def forward(
        self,
        image: torch.Tensor,
        tokens: torch.Tensor,
        code_loss: CodeLoss | None = None,
        generated: Generated | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Calls `loss`. Wrappers such as DistributedDataParallel and torch.compile require calls through `forward`.

        If distributions are given, as `generated`, nothing is predicted: the result is `code_loss` of them.
        """
        if generated is not None:
            assert code_loss is not None and generated.probabilities is not None
            return code_loss(generated.probabilities, generated.features)
        return self.loss(image, tokens, code_loss)


def total_loss(
    loss: torch.Tensor,
    logs: dict[str, torch.Tensor],
    code_loss: CodeLoss | None,
    logits: torch.Tensor,
    features: torch.Tensor | None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A token model's loss and logs, with `code_loss` of the softmax of `logits` added if it is given.

    Args:
        loss: (B,) loss on the tokens, which is then also logged as "token_loss".
        logs: name -> (B,).
        code_loss: see `TokenModel.loss`.
        logits: (B, L, V).
        features: the image features (B, M, E) that the tokens were predicted from; None if there are none.
    """
    if code_loss is None:
        return loss, logs
    value, more = code_loss(logits.float().softmax(-1), features)
    return loss + value, {**logs, "token_loss": loss.detach(), **more}


TOKEN_MODELS: Registry[type[TokenModel]] = Registry("token model", "model.kind")
M = TypeVar("M", bound=type[TokenModel])


def register_token_model(name: str) -> Callable[[M], M]:
    """Class decorator that registers a TokenModel.

    Args:
        name: the value of `model.kind` that selects it.

    Raises ValueError if another class is already registered under that name.
    """

    def register(cls: M) -> M:
        TOKEN_MODELS.add(name, cls)
        return cls

    return register


def build_token_model(config: LMModelConfig, *, image_size: int, vocab_size: int, length: int) -> TokenModel:
    """Builds the freshly initialized token model that `model.kind` selects. Raises UserError for an unknown kind."""
    return TOKEN_MODELS.find(config.kind)(config, image_size=image_size, vocab_size=vocab_size, length=length)
