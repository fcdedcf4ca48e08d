"""The quantizer interface and the registry that finds quantizers by name.

B batch, L code length, d channels, V codebook size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch import nn

from uvim_fsq.config.registry import Registry
from uvim_fsq.config.schema import QuantizerConfig


class Quantized(NamedTuple):
    """The output of a quantizer.

    Attributes:
        codes: (..., d) float32. The quantizer decides how gradients pass; FSQ and VQ use straight-through.
        indices: (...) int64 in [0, V).
        loss: (B,) float32, an auxiliary loss that training adds to the task loss, already weighted; or None.
        logs: name -> (B,) tensors that training logs.
    """

    codes: torch.Tensor
    indices: torch.Tensor
    loss: torch.Tensor | None = None
    logs: dict[str, torch.Tensor] | None = None


class Quantizer(nn.Module, ABC):
    """Maps real vectors to a finite set of codes.

    Subclasses set `codebook_size` (V) and `dim` (d), and also `levels` if they quantize each channel separately. They
    compute in float32 even inside autocast. A quantizer that learns from statistics instead of gradients collects them
    in `accumulate` and applies them in `on_optimizer_step`. Results then do not depend on gradient accumulation or the
    number of processes.
    """

    codebook_size: int
    dim: int
    #: Number of levels of each channel for scalar quantizers; empty for all others.
    levels: tuple[int, ...] = ()

    @abstractmethod
    def forward(self, z: torch.Tensor) -> Quantized:
        """Quantizes real vectors (..., d). An auxiliary loss per example requires the shape (B, L, d)."""

    @abstractmethod
    def indices_to_codes(self, indices: torch.Tensor) -> torch.Tensor:
        """(...) int64 -> (..., d) float32 codes."""

    @abstractmethod
    def codes_to_indices(self, codes: torch.Tensor) -> torch.Tensor:
        """(..., d) codes -> (...) int64 in [0, V)."""

    def codebook(self) -> torch.Tensor:
        """All codes in index order: (V, d) float32."""
        return self.indices_to_codes(torch.arange(self.codebook_size, device=self.device))

    def expected_codes(self, probabilities: torch.Tensor) -> torch.Tensor:
        """Soft codes: probabilities (..., V) -> the expected code (..., d) float32."""
        with torch.autocast(probabilities.device.type, enabled=False):
            return probabilities.float() @ self.codebook()

    def indices_to_digits(self, indices: torch.Tensor) -> torch.Tensor:
        """(...) int64 -> the level of each channel, (..., d) int64. Only for quantizers with `levels`."""
        raise NotImplementedError(f"{type(self).__name__} has no levels")

    def accumulate(self, z: torch.Tensor, indices: torch.Tensor) -> None:
        """Collects statistics of one micro batch: `z` (..., d), the input of `forward`, and its indices (...)."""

    def on_optimizer_step(self, reduce: Callable[[torch.Tensor], torch.Tensor], seed: int) -> None:
        """Called once per optimizer step, in every process.

        Args:
            reduce: sums a tensor over all processes.
            seed: for random choices; the same in all processes, different at each step.
        """

    @property
    def device(self) -> torch.device:
        """The device of the quantizer's tensors."""
        return next((x.device for x in (*self.parameters(), *self.buffers())), torch.device("cpu"))


Factory = Callable[[QuantizerConfig], Quantizer]
F = TypeVar("F", bound=Factory)
QUANTIZERS: Registry[Factory] = Registry("quantizer", "model.quantizer.kind")


def register_quantizer(name: str) -> Callable[[F], F]:
    """Decorator that registers a function building a quantizer from `model.quantizer`.

    Args:
        name: the value of `model.quantizer.kind` that selects it.

    Raises ValueError if another function is already registered under that name.
    """

    def register(factory: F) -> F:
        QUANTIZERS.add(name, factory)
        return factory

    return register


def build_quantizer(config: QuantizerConfig) -> Quantizer:
    """Builds the quantizer that `model.quantizer` selects. Raises UserError for an unknown kind."""
    return QUANTIZERS.find(config.kind)(config)
