"""`torch.compile` as this project uses it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from uvim_fsq.errors import UserError

Compilable = TypeVar("Compilable", bound=Callable[..., Any])
COMPILERS = ("g++", "clang++", "c++", "cl")


def require_compiler() -> None:
    """Raises UserError without a C++ compiler."""
    if "CXX" not in os.environ and not any(map(shutil.which, COMPILERS)):
        keys = "train.compile=false eval.compile=false eval.int8_cross_kv=false"
        raise UserError(f"compiling needs a C++ compiler; install g++, or set {keys}")


def compiled(function: Compilable, **options: Any) -> Compilable:
    """One graph per batch size, of which there are not many. `options` are those of `torch.compile`.

    Raises UserError without a C++ compiler, which torch would only find out in the first step.
    """
    require_compiler()
    # Its splitting of the graph for DistributedDataParallel knows no recomputation, which the label head needs.
    torch._dynamo.config.optimize_ddp = False
    # Decoding has a graph for each batch size and part of the cache; eight, the default, are few.
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(function, dynamic=False, **options)  # type: ignore[return-value]
