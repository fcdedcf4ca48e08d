"""Adafactor: factored dimensions, stacked updates, missing gradients, and saved states."""

from __future__ import annotations

import io
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.host_sync import NoHostSync
from uvim_fsq.errors import UserError
from uvim_fsq.training import adafactor
from uvim_fsq.training.adafactor import Adafactor, factored_axes
from uvim_fsq.training.layouts import Layout, reference_layouts


@pytest.mark.parametrize(
    ("theirs", "axes"),
    [
        ((40,), None),
        ((31, 500), None),
        ((32, 500), (0, 1)),
        ((768, 12, 64), (2, 0)),
        ((12, 64, 768), (1, 2)),
        ((3, 768, 12, 64), (3, 1)),
        ((12, 64), None),
        ((16, 16, 3, 768), None),
        ((32, 32, 3, 768), (1, 3)),
        ((256, 256, 768), (1, 2)),  # of equals the last
        ((768, 256, 256), (2, 0)),
        ((64, 64, 64), (1, 2)),
        ((1, 1024, 768), (2, 1)),
    ],
)
def test_statistics_are_factored_over_the_two_largest_dimensions(
    theirs: tuple[int, ...], axes: tuple[int, int] | None
) -> None:
    """Of the reference's dimensions, whatever the order in which ours has them."""
    assert factored_axes(Layout(theirs, tuple(range(len(theirs))))) == axes
    for seed in range(5):
        order = tuple(np.random.default_rng(seed).permutation(len(theirs)).tolist())
        sizes = tuple(theirs[order.index(axis)] for axis in range(len(theirs)))
        found = factored_axes(Layout(sizes, order))
        assert (found and tuple(order.index(axis) for axis in found)) == axes


RATES = [0.0, 1e-3, 2e-3, 5e-4, 1e-3, 1e-4]


#: Our sizes and the reference's order: projections into heads and out of them, tied label maps, linear maps, vectors.
LAYOUTS = [
    *[Layout((4, 40, 36), (2, 0, 1))] * 3,
    *[Layout((36, 4, 40), (1, 2, 0))] * 2,
    *[Layout((3, 2, 32, 48), (0, 3, 1, 2))] * 2,
    *[Layout((36, 36, 40), (1, 0, 2))] * 2,
    *[Layout((40, 50), (0, 1))] * 3,
    Layout((16, 40), (0, 1)),
    Layout((7,), (0,)),
    Layout((40,), (0,)),
]


def line_by_line(parameter: torch.Tensor, gradients: list[torch.Tensor], decay: float) -> torch.Tensor:
    """The reference's update of one parameter in its layout, without stacks."""
    w, momentum = parameter.clone(), torch.zeros_like(parameter, dtype=torch.bfloat16)
    ranked = np.argsort(w.shape, kind="stable").tolist()
    factored = len(ranked) > 1 and w.shape[ranked[-2]] >= 32
    row: Any = 0.0
    column: Any = 0.0
    v: Any = 0.0
    for t, g in enumerate(gradients):
        beta2 = min(0.95, 1 - (t + 1) ** -0.8)
        square = g * g + 1e-30
        if factored:
            small, large = ranked[-2:]
            row = beta2 * row + (1 - beta2) * square.mean(large, keepdim=True)
            column = beta2 * column + (1 - beta2) * square.mean(small, keepdim=True)
            u = g * (row / row.mean(small, keepdim=True)) ** -0.5 * column**-0.5
        else:
            v = beta2 * v + (1 - beta2) * square
            u = g * v**-0.5
        new = (momentum * torch.tensor(0.9, dtype=torch.bfloat16)).float() + (1 - 0.9) * u
        momentum = new.bfloat16()
        w = w - (RATES[t] * new + RATES[t] / 2e-3 * decay * w)
    return w


def drawn(seed: int) -> list[torch.Tensor]:
    """Numbers of different size by row and by column, as gradients are, in the shapes that a model would have."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for layout in LAYOUTS:
        x = torch.randn(layout.sizes, generator=generator)
        for axis, size in enumerate(layout.sizes):
            x = x * torch.rand([size if i == axis else 1 for i in range(x.ndim)], generator=generator)
        found.append(x.flatten(0, -2) if x.ndim > 2 else x)
    return found


def theirs(x: torch.Tensor, layout: Layout) -> torch.Tensor:
    return x.reshape(layout.sizes).permute(layout.order)


def made(decay: float = 0.05, seed: int = 0) -> tuple[list[nn.Parameter], Adafactor]:
    """Parameters of all layouts, the first half of them decaying, and their optimizer."""
    parameters = [nn.Parameter(x) for x in drawn(seed)]
    half = len(parameters) // 2
    groups = [{"params": parameters[:half], "weight_decay": decay}, {"params": parameters[half:]}]
    return parameters, Adafactor(groups, dict(zip(parameters, LAYOUTS, strict=True)))


def take(optimizer: Adafactor, parameters: list[nn.Parameter], step: int, without: int | None = None) -> None:
    """One step by gradients that depend on its number only; the parameter numbered `without` gets none."""
    for i, (parameter, gradient) in enumerate(zip(parameters, drawn(100 + step), strict=True)):
        parameter.grad = None if i == without else gradient
    for group in optimizer.param_groups:
        group["lr"], group["schedule"] = RATES[step], RATES[step] / 2e-3
    optimizer.step()


@pytest.mark.slow
@pytest.mark.parametrize("most", [1, 9000, 2**26])
def test_stacked_updates_equal_a_line_by_line_calculation(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many parameters are updated together."""
    monkeypatch.setattr(adafactor, "STACK", {})
    monkeypatch.setattr(adafactor, "LARGE_STACK", most)
    parameters, optimizer = made()
    for step in range(len(RATES)):
        take(optimizer, parameters, step)
    for i, (parameter, layout) in enumerate(zip(parameters, LAYOUTS, strict=True)):
        start = theirs(drawn(0)[i], layout)
        gradients = [theirs(drawn(100 + step)[i], layout) for step in range(len(RATES))]
        wanted = line_by_line(start, gradients, 0.05 if i < len(parameters) // 2 else 0.0) - start
        moved = theirs(parameter.detach(), layout) - start
        assert (moved - wanted).abs().max() < 1e-3 * wanted.abs().max(), (i, layout)
    sizes = [sum(p.numel() for p in stack.parameters) for stacks in optimizer._stacks.values() for stack in stacks]
    assert max(sizes) <= max(most, max(p.numel() for p in parameters))
    assert len(sizes) == {1: len(LAYOUTS), 9000: 11, 2**26: 6}[most]


class Operators(TorchDispatchMode):
    """How often each operator ran, views aside."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ not in ("view", "unbind", "split_with_sizes"):
            self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_the_number_of_operators_does_not_grow_with_depth() -> None:
    counts = []
    for depth in (2, 50):
        with torch.device("meta"):
            model = nn.Sequential(*[nn.Sequential(nn.Linear(40, 40), nn.LayerNorm(40)) for _ in range(depth)])
        optimizer = Adafactor([{"params": list(model.parameters()), "weight_decay": 0.1}], reference_layouts(model))
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3
        optimizer.step()
        with Operators() as operators:
            optimizer.step()
        counts.append(operators.counts)
    assert counts[0] == counts[1] and 10 < sum(counts[0].values()) < 50


def test_a_step_does_not_wait_for_the_device() -> None:
    parameters, optimizer = made()
    with NoHostSync():
        for step in range(2):
            take(optimizer, parameters, step)


def test_a_saved_state_continues_bit_for_bit() -> None:
    """Through a file, without unpickling; the momentum stays in bf16 though torch casts what it loads."""
    whole, optimizer = made()
    for step in range(6):
        take(optimizer, whole, step)
        if step == 2:
            file = io.BytesIO()
            torch.save([optimizer.state_dict(), [p.detach() for p in whole]], file)
    file.seek(0)
    state, values = torch.load(file, weights_only=True)
    halves, again = made(seed=1)
    take(again, halves, 0)  # what it knew before is forgotten
    for parameter, value in zip(halves, values, strict=True):
        parameter.data.copy_(value)
    again.load_state_dict(state)
    for step in range(3, 6):
        take(again, halves, step)
    for one, two in zip(whole, halves, strict=True):
        assert torch.equal(one, two)
        assert optimizer.state[one].keys() == again.state[two].keys()
        assert again.state[two]["momentum"].dtype == torch.bfloat16 and again.state[two]["step"] == 6
        assert all(torch.equal(optimizer.state[one][k], again.state[two][k]) for k in again.state[two] if k != "step")


def test_the_state_of_another_optimizer_is_refused() -> None:
    parameters, optimizer = made()
    adamw = torch.optim.AdamW([{"params": group["params"]} for group in optimizer.param_groups])
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    adamw.step()
    with pytest.raises(UserError, match="not from this Adafactor"):
        optimizer.load_state_dict(adamw.state_dict())


def test_a_parameter_without_a_gradient_does_not_move() -> None:
    """A parameter whose first gradient comes late begins then, whatever the others have behind them."""
    parameters, optimizer = made()
    late, start = parameters[1], parameters[1].detach().clone()
    take(optimizer, parameters, 1, without=1)
    assert torch.equal(late, start) and not optimizer.state[late]
    fresh, other = made()
    for step in (2, 3):
        take(optimizer, parameters, step)
        take(other, fresh, step)
    assert torch.equal(late, fresh[1]) and not torch.equal(late, start)
    assert optimizer.state[late]["step"] == 2 and optimizer.state[parameters[0]]["step"] == 3
    now = late.detach().clone()
    take(optimizer, parameters, 4, without=1)
    assert torch.equal(late, now) and not torch.equal(parameters[0], fresh[0])


def test_kernels_decay_at_rate_0_too() -> None:
    """As the reference's do, whose rate multiplier leaves decay alone."""
    parameters, optimizer = made(decay=0.5)
    before = [p.detach().clone() for p in parameters]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    for group in optimizer.param_groups:
        group["lr"], group["schedule"] = 0.0, 0.5
    optimizer.step()
    half = len(parameters) // 2
    for i, (now, then) in enumerate(zip(parameters, before, strict=True)):
        torch.testing.assert_close(now.detach(), then * (0.75 if i < half else 1.0))


def test_the_closure_is_called_with_gradients_enabled() -> None:
    """Before any rate is set, kernels decay by the whole of their decay and nothing else moves."""
    parameters, optimizer = made(decay=0.5)

    def closure() -> float:
        loss = torch.stack([p.sum() for p in parameters]).sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == pytest.approx(sum(x.sum().item() for x in drawn(0)), rel=1e-4)
    for i, (parameter, start) in enumerate(zip(parameters, drawn(0), strict=True)):
        assert torch.equal(parameter.detach(), start * 0.5 if i < len(parameters) // 2 else start)
