"""Adafactor as in the UViM reference code (big_vision, JAX).

Second moments are factored, the momentum is in bf16, and weight decay is scaled by the schedule, not by the learning
rate. Parameters of equal layout are updated as one stack, so that the number of kernels does not grow with the depth of
the model. The second moment is factored in the reference's layout of a parameter, which may differ from ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import _foreach_add_, _foreach_mul_  # pyright: ignore[reportPrivateImportUsage]

from uvim_fsq.errors import UserError
from uvim_fsq.training.layouts import Layout

#: Second moments are factored only if the two largest dimensions have at least this size.
MIN_FACTORED_SIZE = 32
#: Added to squared gradients.
EPSILON = 1e-30
#: Maximum number of elements in a stack of several parameters. On a CPU it fits the cache; elsewhere it is 256 MiB.
STACK = {"cpu": 2**18}
LARGE_STACK = 2**26

Axes = tuple[int, int]
States = Mapping[torch.Tensor, dict[str, Any]]


def factored_axes(layout: Layout) -> Axes | None:
    """The two axes of `layout.sizes` over which the second moment is factored; None if it is not factored.

    They are the two largest dimensions. Ties go to the dimension that comes later in the reference's axis order.
    """
    ranked = sorted(layout.order, key=lambda axis: layout.sizes[axis])
    if len(ranked) < 2 or layout.sizes[ranked[-2]] < MIN_FACTORED_SIZE:
        return None
    return ranked[-2], ranked[-1]


class Adafactor(torch.optim.Optimizer):
    """w <- w - (lr * m + schedule * weight_decay * w), where m is the momentum of g / sqrt(v), v the second moment.

    A group's `lr` (which includes the schedule) and `schedule` (in [0, 1]) are set before each step.

    Args:
        groups: parameter groups with their `weight_decay`; parameters are float32.
        layouts: the layout of each parameter in the reference code.
        betas: decay rates of the momentum and of the second moment. In update t, counted from 0, the latter is at most
            1 - (t + 1)^-0.8.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        layouts: Mapping[torch.Tensor, Layout],
        betas: tuple[float, float] = (0.9, 0.95),
    ) -> None:
        self._layouts = layouts
        # The stored momentum is decayed in its own dtype, where 0.9 is 0.8984.
        self._betas = (betas[0], torch.tensor(betas[0], dtype=torch.bfloat16).item(), betas[1])
        self._stacks: dict[int, list[_Stack]] = {}
        super().__init__(groups, {"lr": 0.0, "schedule": 1.0, "weight_decay": 0.0})

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores a loaded state, in which torch has cast the momentum to the dtype of the parameters."""
        super().__setstate__(state)
        self._stacks = {}
        for own in self.state.values():
            if "momentum" not in own:
                raise UserError("the saved optimizer state is not from this Adafactor; training cannot resume from it")
            own["momentum"] = own["momentum"].to(torch.bfloat16)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Updates every parameter that has a gradient, without host synchronization."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for index, group in enumerate(self.param_groups):
            for stack in self._stacked(index, [p for p in group["params"] if p.grad is not None]):
                stack.update(group["lr"], group["schedule"] * group["weight_decay"], self._betas)
        return loss

    def _stacked(self, index: int, parameters: list[torch.Tensor]) -> list[_Stack]:
        """The stacks of a group, rebuilt if a state was loaded or the set of parameters with gradients changed."""
        stacks = self._stacks.get(index, [])
        if {id(p) for stack in stacks for p in stack.parameters} != {id(p) for p in parameters}:
            stacks = [
                _Stack(part, self._layouts[part[0]], self.state)
                for compatible in self._group_compatible(parameters)
                for part in _split_by_size(compatible)
            ]
            self._stacks[index] = stacks
        return stacks

    def _group_compatible(self, parameters: Iterable[torch.Tensor]) -> Iterable[list[torch.Tensor]]:
        """Groups parameters that can be updated together: those of equal layout, and all unfactored ones."""
        kinds: dict[Any, list[torch.Tensor]] = {}
        for parameter in parameters:
            layout, updates = self._layouts[parameter], self.state[parameter].get("step", 0)
            kinds.setdefault((layout if factored_axes(layout) else None, updates), []).append(parameter)
        return kinds.values()


def _split_by_size(parameters: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Splits parameters, in order, into lists that do not exceed the size of a stack."""
    part: list[torch.Tensor] = []
    for parameter in parameters:
        limit = STACK.get(parameter.device.type, LARGE_STACK)
        if part and sum(p.numel() for p in part) + parameter.numel() > limit:
            yield part
            part = []
        part.append(parameter)
    yield part


class _Stack:
    """Parameters that are updated together. Their state is stored in shared tensors, of which `state` holds views.

    Factored: tensors (n, *sizes) for n parameters of equal layout. Unfactored: one flat tensor for parameters of any
    shapes.
    """

    def __init__(self, parameters: list[torch.Tensor], layout: Layout, state: States) -> None:
        self.parameters, self.sizes = parameters, layout.sizes
        self.states = [state[parameter] for parameter in parameters]
        axes = factored_axes(layout)
        #: Factored axes of the stacked tensor, whose first axis enumerates the parameters.
        self.axes = (axes[0] + 1, axes[1] + 1) if axes else None
        for parameter, own in zip(parameters, self.states, strict=True):
            if not own:
                own.update(self._initial_state(parameter))
        self.momentum = self._join([own["momentum"] for own in self.states])
        self._store_views("momentum", self._split(self.momentum))
        if self.axes is None:
            self.square = self._join([own["square"] for own in self.states])
            self._store_views("square", self._split(self.square))
        else:
            self.row, self.column = (torch.stack([own[name] for own in self.states]) for name in ("row", "column"))
            self._store_views("row", self.row.unbind())
            self._store_views("column", self.column.unbind())

    def _initial_state(self, parameter: torch.Tensor) -> dict[str, Any]:
        state = {"step": 0, "momentum": torch.zeros_like(parameter, dtype=torch.bfloat16)}
        if self.axes is None:
            return {**state, "square": torch.zeros_like(parameter)}
        row, column = (
            parameter.new_zeros([1 if i + 1 == axis else size for i, size in enumerate(self.sizes)])
            for axis in self.axes
        )
        return {**state, "row": row, "column": column}

    def _store_views(self, name: str, views: Iterable[torch.Tensor]) -> None:
        for own, view in zip(self.states, views, strict=True):
            own[name] = view

    def _join(self, tensors: Iterable[torch.Tensor]) -> torch.Tensor:
        """Copies tensors of the parameters' shapes into one tensor."""
        if self.axes is None:
            return torch.cat([tensor.flatten() for tensor in tensors])
        return torch.stack([tensor.reshape(self.sizes) for tensor in tensors])

    def _split(self, joined: torch.Tensor) -> list[torch.Tensor]:
        """Views of a joined tensor in the parameters' shapes."""
        parts = joined.unbind() if self.axes else joined.split([p.numel() for p in self.parameters])
        return [part.view(p.shape) for part, p in zip(parts, self.parameters, strict=True)]

    def update(self, lr: float, decay: float, betas: tuple[float, float, float]) -> None:
        """One step along the parameters' gradients.

        Args:
            lr: the learning rate.
            decay: schedule times weight decay.
            betas: the decay of the momentum, the same rounded to bf16, and the decay of the second moment.
        """
        gradients = self._join([p.grad for p in self.parameters if p.grad is not None])
        beta2 = min(betas[2], 1 - (self.states[0]["step"] + 1) ** -0.8)
        factor = self._normalize(gradients, 1 - beta2)
        decayed = self.momentum * betas[1]
        # In float32: the update is applied unrounded, and only the stored momentum is rounded.
        updates = torch.addcmul(decayed, gradients, factor, value=1 - betas[0])
        self.momentum.copy_(updates)
        parts = self._split(updates)
        if lr == 0:  # weight decay applies even to a frozen encoder
            _foreach_mul_(self.parameters, 1 - decay)
        else:
            if decay:
                _foreach_add_(parts, self.parameters, alpha=decay / lr)
            _foreach_add_(self.parameters, parts, alpha=-lr)
        for own in self.states:
            own["step"] += 1

    def _normalize(self, gradients: torch.Tensor, new: float) -> torch.Tensor:
        """Updates the second moment with the squared gradients, weighted by `new`, and normalizes `gradients` by it.

        If factored, `gradients` is divided in place by the root of the row factor. Returns the remaining factor, which
        broadcasts against `gradients`.
        """
        if self.axes is None:
            self.square.lerp_(gradients.square().add_(EPSILON), new)
            return self.square.rsqrt()
        squares = gradients.square()
        for moment, axis in ((self.row, self.axes[0]), (self.column, self.axes[1])):
            moment.lerp_(squares.mean(axis, keepdim=True).add_(EPSILON), new)
        gradients.mul_(self.row.mean(self.axes[1], keepdim=True).sqrt_() * self.row.rsqrt())
        return self.column.rsqrt()
