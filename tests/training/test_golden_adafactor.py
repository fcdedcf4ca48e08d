"""The layouts of Adafactor's statistics are those of the reference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from tests.support.golden import golden_checkpoint
from tests.support.golden_models import ORACLES, golden_lm, golden_oracle
from uvim_fsq.interop.published import Rule, lm_rules, lm_shape, oracle_rules, oracle_shape
from uvim_fsq.tasks.base import Real
from uvim_fsq.training.layouts import reference_layouts

#: The LM's start vector is a row of the reference's token table, its head has a column for it.
APART = {"start", "token_embedding.weight", "head.weight", "head.bias"}


def models() -> Iterator[tuple[nn.Module, Mapping[str, torch.Tensor], list[Rule]]]:
    """Small models of every kind, published arrays of their shapes, and how these become ours."""
    for name, channels in ORACLES.items():
        tensors = golden_checkpoint(f"{name}.npz")[0]
        real = {channel: isinstance(kind, Real) for channel, kind in channels.items()}
        yield golden_oracle(name)[0], tensors, oracle_rules(oracle_shape(tensors, name), real)
    tensors = golden_checkpoint("lm.npz")[0]
    yield golden_lm()[0], tensors, lm_rules(lm_shape(tensors, "lm.npz"))


def test_layouts_equal_those_of_the_reference() -> None:
    """Every number of every parameter, seen through its layout, lies where the published array has it."""
    for model, tensors, rules in models():
        layouts, seen = reference_layouts(model), 0
        parameters = dict(model.named_parameters())
        assert set(layouts) == set(parameters.values())
        for ours, theirs, make in rules:
            if ours not in parameters or ours in APART:
                continue
            shapes = [tensors[name].shape for name in theirs]
            arrays = [torch.arange(shape.numel()).view(shape) + 10**6 * i for i, shape in enumerate(shapes)]
            sizes, order = layouts[parameters[ours]]
            view = make(*arrays).reshape(sizes).permute(order)
            wanted = arrays[0] if len(arrays) == 1 else torch.stack(arrays)
            view = view[0] if view.ndim > wanted.ndim else view
            is_linear = view.ndim == 2 and torch.equal(view.T, wanted)  # the order of its axes does not matter
            assert torch.equal(view, wanted) or is_linear, ours
            seen += 1
        assert seen == len(set(parameters) - APART)
