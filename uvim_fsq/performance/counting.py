"""Counts the FLOP and the saved bytes of any module by running it without data, for models that have no formula.

Nothing is computed and no memory is allocated: the module is copied with tensors that have shapes but no values.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode


def meta_copy(module: nn.Module) -> Any:
    """A copy on the meta device, made without copying the weights."""
    return _shapes_of(module, lambda x: torch.empty_like(x, device="meta"))


def forward_flops(module: nn.Module, shape: Sequence[int]) -> float:
    """FLOP of the forward pass on one floating-point input. A multiply-add counts as 2, elementwise operations as 0."""
    from torch.utils.flop_counter import FlopCounterMode  # imports Triton

    # The caller may have made another device the default one.
    with torch.device("cpu"), FakeTensorMode(allow_non_fake_inputs=True):
        model, x = _fake_copy(module).eval(), torch.zeros(*shape)
        # Attention as matrix products, because the counter does not know every fused kernel.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(x)
    return float(counter.get_total_flops())


def saved_bytes(module: nn.Module, shape: Sequence[int], *, bf16: bool) -> float:
    """Bytes that the forward pass on one floating-point input saves for the backward pass, on a GPU.

    Attention saves its inputs and its output, as fused kernels do. Weights and their copies in low precision are not
    counted.

    Args:
        module: the module, which is counted in training mode.
        shape: that of the input.
        bf16: under autocast.
    """
    # The caller may have made another device the default one.
    with torch.device("cpu"), FakeTensorMode(allow_non_fake_inputs=True):
        model, x = _fake_copy(module).train(), torch.zeros(*shape)
        weights = {size for p in model.parameters() for size in (tuple(p.shape), tuple(p.shape)[::-1])}
        storages: dict[int, Any] = {}

        def keep(x: torch.Tensor) -> torch.Tensor:
            if tuple(x.shape) not in weights:
                storages[x.untyped_storage()._cdata] = x.untyped_storage()
            return x

        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x)
        with torch.enable_grad(), hooks, torch.autocast("cpu", torch.bfloat16, enabled=bf16), _FusedAttention():
            model(x)
    return float(sum(storage.nbytes() for storage in storages.values()))


def _shapes_of(module: nn.Module, empty: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A copy of a module in which `empty` makes every parameter and buffer."""
    # `deepcopy` takes what its memo has already.
    memo: dict[int, Any] = {id(p): nn.Parameter(empty(p), requires_grad=p.requires_grad) for p in module.parameters()}
    return copy.deepcopy(module, memo | {id(b): empty(b) for b in module.buffers()})


def _fake_copy(module: nn.Module) -> Any:
    """A copy with fake tensors on the CPU, where autocast works. Call it inside FakeTensorMode."""
    return _shapes_of(module, lambda x: torch.empty(x.shape, dtype=x.dtype, device="cpu"))


class _FusedAttention(TorchFunctionMode):
    """Replaces attention by an operation that saves what fused kernels save; torch's CPU kernel also saves scores."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention and len(args) >= 3:
            low = torch.is_autocast_enabled("cpu")
            return _Attended.apply(*(x.to(torch.bfloat16) if low else x for x in args[:3]))
        return func(*args, **(kwargs or {}))


class _Attended(torch.autograd.Function):
    """Query (..., H, N, d), key (..., H, M, d), value (..., H, M, e) -> (..., H, N, e), without values."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        # In memory the heads stand after the positions, so that joining them copies nothing.
        *batch, heads, length, _ = query.shape
        out = query.new_empty(*batch, length, heads, value.shape[-1]).transpose(-3, -2)
        ctx.save_for_backward(query, key, value, out)
        return out
