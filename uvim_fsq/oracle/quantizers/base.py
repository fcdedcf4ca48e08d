"""The contract of the bottleneck's quantizers, and the registry that finds them by name.

B batch, L code length, d channels, V codebook size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch import nn

from uvim_fsq.config.schema import QuantizerConfig
from uvim_fsq.errors import UserError


class Quantized(NamedTuple):
    """What a forward pass returns.

    Attributes:
        codes: (..., d) float32, with the gradient of the quantizer's choice (straight through for FSQ and VQ).
        indices: (...) int64 in [0, V).
        loss: an auxiliary loss (B,) float32 that training adds to the task loss, already weighted; None for none.
        logs: name -> (B,) tensors that training logs.
    """

    codes: torch.Tensor
    indices: torch.Tensor
    loss: torch.Tensor | None = None
    logs: dict[str, torch.Tensor] = {}  # noqa: RUF012  (a NamedTuple's default; never written to)


class Quantizer(nn.Module, ABC):
    """Maps real vectors to a finite set of codes.

    Subclasses set `codebook_size` (V) and `dim` (d) and, if each channel has its own scalar levels, `levels`. They
    compute in float32 inside any autocast. A quantizer that learns from statistics rather than gradients gathers them
    in `accumulate` and applies them in `on_optimizer_step`, so that gradient accumulation and the number of processes
    make no difference.
    """

    codebook_size: int
    dim: int
    #: Levels of each channel for scalar quantizers; empty for all others.
    levels: tuple[int, ...] = ()

    @abstractmethod
    def forward(self, z: torch.Tensor) -> Quantized:
        """Quantizes (..., d) reals; (B, L, d) where the auxiliary loss is per example."""

    @abstractmethod
    def indices_to_codes(self, indices: torch.Tensor) -> torch.Tensor:
        """(...) int64 -> (..., d) float32 codes."""

    @abstractmethod
    def codes_to_indices(self, codes: torch.Tensor) -> torch.Tensor:
        """(..., d) codes -> (...) int64 in [0, V)."""

    def codebook(self) -> torch.Tensor:
        """(V, d) float32, all codes in the order of their indices."""
        return self.indices_to_codes(torch.arange(self.codebook_size, device=self.device))

    def expected_codes(self, probabilities: torch.Tensor) -> torch.Tensor:
        """The mean code under (..., V) probabilities -> (..., d) float32: a soft code between the codebook's."""
        with torch.autocast(probabilities.device.type, enabled=False):
            return probabilities.float() @ self.codebook()

    def indices_to_digits(self, indices: torch.Tensor) -> torch.Tensor:
        """(...) int64 -> (..., d) int64 level of each channel. Only for quantizers with `levels`."""
        raise NotImplementedError(f"{type(self).__name__} has no levels")

    def accumulate(self, z: torch.Tensor, indices: torch.Tensor) -> None:
        """Takes note of one micro batch in training: `z` (..., d) as `forward` got it, and its indices (...)."""

    def on_optimizer_step(self, reduce: Callable[[torch.Tensor], torch.Tensor], seed: int) -> None:
        """Called once per optimizer step, in all processes.

        Args:
            reduce: sums a tensor over all processes.
            seed: for random choices; the same in all processes, another at each step.
        """

    @property
    def device(self) -> torch.device:
        """Where the quantizer's tensors are."""
        return next((x.device for x in (*self.parameters(), *self.buffers())), torch.device("cpu"))


Factory = Callable[[QuantizerConfig], Quantizer]
F = TypeVar("F", bound=Factory)
_QUANTIZERS: dict[str, Factory] = {}


def register_quantizer(name: str) -> Callable[[F], F]:
    """Decorator for a function that builds a quantizer from `model.quantizer`, under the name `model.quantizer.kind`.

    Raises ValueError if another function already has that name.
    """

    def register(factory: F) -> F:
        known = _QUANTIZERS.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (factory.__module__, factory.__qualname__):
            raise ValueError(f"quantizer {name!r} is already registered by {known.__module__}.{known.__qualname__}")
        _QUANTIZERS[name] = factory
        return factory

    return register


def build_quantizer(config: QuantizerConfig) -> Quantizer:
    """The quantizer that `model.quantizer` asks for. Raises UserError for an unknown kind."""
    if config.kind not in _QUANTIZERS:
        raise UserError(
            f"model.quantizer.kind={config.kind}: known quantizers are {', '.join(sorted(_QUANTIZERS))}; "
            "one of your own must be registered by a module in `plugins`"
        )
    return _QUANTIZERS[config.kind](config)
