"""`torch.compile` with the settings that this package needs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from uvim_fsq.errors import UserError

Compilable = TypeVar("Compilable", bound=Callable[..., Any])
COMPILERS = ("g++", "clang++", "c++", "cl")


#: What to do without a compiler.
WITHOUT = "or set train.compile=false eval.compile=false eval.int8_cross_kv=false"


def require_compiler(remedy: str = WITHOUT) -> None:
    """Raises UserError, ending with `remedy`, if no C++ compiler is found ($CXX, or one of `COMPILERS` on the path)."""
    if "CXX" not in os.environ and not any(map(shutil.which, COMPILERS)):
        raise UserError(f"compilation needs a C++ compiler; install g++, {remedy}")


def compiled(function: Compilable, **options: Any) -> Compilable:
    """`function` compiled with static shapes: one graph per batch size. `options` are passed to `torch.compile`.

    Raises UserError if there is no C++ compiler. Torch itself would only notice in the first step.
    """
    require_compiler()
    # The graph splitting for DistributedDataParallel does not support activation checkpointing (the label head).
    torch._dynamo.config.optimize_ddp = False
    # Decoding has one graph per batch size and cache length; the default limit of 8 is too low.
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(function, dynamic=False, **options)  # type: ignore[return-value]
