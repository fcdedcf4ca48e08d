"""A token model in bf16 for decoding, cast once instead of in every batch."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Protocol, TypeVar

import torch
from torch import nn


class HasHead(Protocol):
    """A model with an output layer."""

    head: nn.Linear

    def modules(self) -> Iterator[nn.Module]: ...


Model = TypeVar("Model", bound=HasHead)


def with_bf16_weights(model: Model) -> Model:
    """A copy with its matrices in bf16. Embeddings, norms, image normalization and the head stay in float32."""
    model = copy.deepcopy(model)
    for part in model.modules():
        if isinstance(part, (nn.Linear, nn.Conv2d)) and part is not model.head:
            part.to(torch.bfloat16)
    return model
