"""The reference's Adafactor: factored second moments, momentum in bf16, weight decay by the schedule alone.

Parameters of one shape are updated as one stack, so that the number of kernels does not grow with the depth of a
model. Knows no model: a parameter's layout says how the reference shapes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import _foreach_add_, _foreach_mul_  # pyright: ignore[reportPrivateImportUsage]

from uvim_fsq.errors import UserError
from uvim_fsq.training.layouts import Layout

#: Second moments are factored over two dimensions of at least this size.
LEAST = 32
#: Added to squared gradients.
EPSILON = 1e-30
#: Most numbers in a stack, unless one parameter has more: what a CPU's cache holds; elsewhere 256 MiB in float32.
STACK = {"cpu": 2**18}
LARGE_STACK = 2**26

Axes = tuple[int, int]
States = Mapping[torch.Tensor, dict[str, Any]]


def factored_axes(layout: Layout) -> Axes | None:
    """The axes of `layout.sizes` over which the second moment is factored; None where it is kept whole.

    They are the two largest dimensions. Of equal ones the reference takes those that come last in its own order.
    """
    ranked = sorted(layout.order, key=lambda axis: layout.sizes[axis])
    if len(ranked) < 2 or layout.sizes[ranked[-2]] < LEAST:
        return None
    return ranked[-2], ranked[-1]


class Adafactor(torch.optim.Optimizer):
    """w <- w - (lr * m + schedule * weight_decay * w), where m is the momentum of g / sqrt(v), v the second moment.

    A group's `lr` (which includes the schedule) and `schedule` (in [0, 1]) are set before each step.

    Args:
        groups: parameter groups with their `weight_decay`; parameters are float32.
        layouts: how the reference holds each parameter.
        betas: decay of the momentum, and the largest of the second moment, whose decay in the t-th update, from 0, is
            at most 1 - (t + 1)^-0.8.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        layouts: Mapping[torch.Tensor, Layout],
        betas: tuple[float, float] = (0.9, 0.95),
    ) -> None:
        self._layouts = layouts
        # The momentum's own decay has its type: 0.9 is 0.8984 there.
        self._betas = (betas[0], torch.tensor(betas[0], dtype=torch.bfloat16).item(), betas[1])
        self._stacks: dict[int, list[_Stack]] = {}
        super().__init__(groups, {"lr": 0.0, "schedule": 1.0, "weight_decay": 0.0})

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Takes over a loaded state, in which torch has cast the momentum to the parameters' own type."""
        super().__setstate__(state)
        self._stacks = {}
        for own in self.state.values():
            if "momentum" not in own:
                raise UserError("the saved optimizer state is not this Adafactor's; its training cannot go on from it")
            own["momentum"] = own["momentum"].to(torch.bfloat16)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Updates every parameter that has a gradient. Never waits for the device."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for index, group in enumerate(self.param_groups):
            for stack in self._stacked(index, [p for p in group["params"] if p.grad is not None]):
                stack.update(group["lr"], group["schedule"] * group["weight_decay"], self._betas)
        return loss

    def _stacked(self, index: int, parameters: list[torch.Tensor]) -> list[_Stack]:
        """The stacks of a group, made anew after a state was loaded or when other parameters have a gradient."""
        stacks = self._stacks.get(index, [])
        if {id(p) for stack in stacks for p in stack.parameters} != {id(p) for p in parameters}:
            stacks = [
                _Stack(some, self._layouts[some[0]], self.state)
                for alike in self._alike(parameters)
                for some in _in_pieces(alike)
            ]
            self._stacks[index] = stacks
        return stacks

    def _alike(self, parameters: Iterable[torch.Tensor]) -> Iterable[list[torch.Tensor]]:
        """Parameters that can be updated together: of one layout, or all whose second moment is kept whole."""
        kinds: dict[Any, list[torch.Tensor]] = {}
        for parameter in parameters:
            layout, updates = self._layouts[parameter], self.state[parameter].get("step", 0)
            kinds.setdefault((layout if factored_axes(layout) else None, updates), []).append(parameter)
        return kinds.values()


def _in_pieces(parameters: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """The same in their order, in lists that are no larger than a stack may be."""
    some: list[torch.Tensor] = []
    for parameter in parameters:
        most = STACK.get(parameter.device.type, LARGE_STACK)
        if some and sum(p.numel() for p in some) + parameter.numel() > most:
            yield some
            some = []
        some.append(parameter)
    yield some


class _Stack:
    """Parameters that are updated together. Their state lies in common tensors; `state` holds views of these.

    Factored: tensors (n, *sizes) of n parameters of one layout. Whole: one flat tensor, of parameters of any shapes.
    """

    def __init__(self, parameters: list[torch.Tensor], layout: Layout, state: States) -> None:
        self.parameters, self.sizes = parameters, layout.sizes
        self.states = [state[parameter] for parameter in parameters]
        axes = factored_axes(layout)
        #: Those of the stack, whose first axis counts parameters.
        self.axes = (axes[0] + 1, axes[1] + 1) if axes else None
        for parameter, own in zip(parameters, self.states, strict=True):
            if not own:
                own.update(self._fresh(parameter))
        self.momentum = self._join([own["momentum"] for own in self.states])
        self._share("momentum", self._split(self.momentum))
        if self.axes is None:
            self.square = self._join([own["square"] for own in self.states])
            self._share("square", self._split(self.square))
        else:
            self.row, self.column = (torch.stack([own[name] for own in self.states]) for name in ("row", "column"))
            self._share("row", self.row.unbind())
            self._share("column", self.column.unbind())

    def _fresh(self, parameter: torch.Tensor) -> dict[str, Any]:
        state = {"step": 0, "momentum": torch.zeros_like(parameter, dtype=torch.bfloat16)}
        if self.axes is None:
            return {**state, "square": torch.zeros_like(parameter)}
        row, column = (
            parameter.new_zeros([1 if i + 1 == axis else size for i, size in enumerate(self.sizes)])
            for axis in self.axes
        )
        return {**state, "row": row, "column": column}

    def _share(self, name: str, views: Iterable[torch.Tensor]) -> None:
        for own, view in zip(self.states, views, strict=True):
            own[name] = view

    def _join(self, tensors: Iterable[torch.Tensor]) -> torch.Tensor:
        """Tensors of the parameters' shapes as one; always a copy."""
        if self.axes is None:
            return torch.cat([tensor.flatten() for tensor in tensors])
        return torch.stack([tensor.reshape(self.sizes) for tensor in tensors])

    def _split(self, joined: torch.Tensor) -> list[torch.Tensor]:
        """Views of it in the parameters' shapes."""
        parts = joined.unbind() if self.axes else joined.split([p.numel() for p in self.parameters])
        return [part.view(p.shape) for part, p in zip(parts, self.parameters, strict=True)]

    def update(self, lr: float, decay: float, betas: tuple[float, float, float]) -> None:
        """One step by the parameters' gradients; `betas`: the momentum's, the same in bf16, the second moment's."""
        gradients = self._join([p.grad for p in self.parameters if p.grad is not None])
        beta2 = min(betas[2], 1 - (self.states[0]["step"] + 1) ** -0.8)
        rest = self._normalise(gradients, 1 - beta2)
        kept = self.momentum * betas[1]
        # In float32; what is stored is rounded, what is applied is not.
        updates = torch.addcmul(kept, gradients, rest, value=1 - betas[0])
        self.momentum.copy_(updates)
        parts = self._split(updates)
        if lr == 0:  # a frozen encoder decays all the same
            _foreach_mul_(self.parameters, 1 - decay)
        else:
            if decay:
                _foreach_add_(parts, self.parameters, alpha=decay / lr)
            _foreach_add_(self.parameters, parts, alpha=-lr)
        for own in self.states:
            own["step"] += 1

    def _normalise(self, gradients: torch.Tensor, new: float) -> torch.Tensor:
        """Adds the gradients' squares to the second moment, of which they then are a share `new`.

        Divides `gradients` by its root but for one factor, which is returned; it broadcasts.
        """
        if self.axes is None:
            self.square.lerp_(gradients.square().add_(EPSILON), new)
            return self.square.rsqrt()
        squares = gradients.square()
        for moment, axis in ((self.row, self.axes[0]), (self.column, self.axes[1])):
            moment.lerp_(squares.mean(axis, keepdim=True).add_(EPSILON), new)
        gradients.mul_(self.row.mean(self.axes[1], keepdim=True).sqrt_() * self.row.rsqrt())
        return self.column.rsqrt()
