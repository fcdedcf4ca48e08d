"""A GPU without numbers: fake tensors that have a device, a dtype and a shape."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import nn

CUDA = torch.device("cuda", 0)


def allow_cuda_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets autocast and `torch.cuda.device` work on a machine without a GPU."""
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda *_: True)
    monkeypatch.setattr("torch.cuda.device", lambda _: contextlib.nullcontext())


def on_cuda(module: nn.Module) -> Any:
    """The module with fake parameters and buffers; `Module.to` cannot replace real tensors by fake ones."""
    for part in module.modules():
        for name, p in part.named_parameters(recurse=False):
            setattr(part, name, nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device=CUDA)))
        for name, x in part.named_buffers(recurse=False):
            setattr(part, name, torch.empty(x.shape, dtype=x.dtype, device=CUDA))
    return module
