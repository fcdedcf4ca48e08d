"""The shapes of our parameters in the UViM reference code (big_vision, JAX), on which its Adafactor depends.

`interop.published` converts weights between the same layouts.

H heads, h head size, E input width, D output width, p patch side, P = p*p pixels, C classes or channels.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple, TypeGuard

import torch
from torch import nn

from uvim_fsq.layers import Attention, PatchEmbed
from uvim_fsq.lm.timm_models import PatchLinear
from uvim_fsq.oracle.label_embedding import CategoricalEmbed, LabelEmbed, RealEmbed
from uvim_fsq.oracle.label_head import LabelHead

if TYPE_CHECKING:
    from timm.layers.attention import Attention as TimmAttention


class Layout(NamedTuple):
    """How to get the reference's parameter from ours: `parameter.view(sizes).permute(order)`."""

    sizes: tuple[int, ...]
    order: tuple[int, ...]


def layout_of(parameter: torch.Tensor, sizes: tuple[int, ...] = (), order: tuple[int, ...] = ()) -> Layout:
    """The layout of a parameter. One size may be -1; `sizes` defaults to its shape and `order` to the same order."""
    shape = parameter.view(sizes).shape if sizes else parameter.shape
    return Layout(tuple(shape), order or tuple(range(len(shape))))


def reference_layouts(model: nn.Module) -> dict[torch.Tensor, Layout]:
    """The layouts of a model's parameters.

    Plain linear maps are not transposed, because the order of their two axes makes no difference to Adafactor. Two
    parameters differ from the reference: there the LM's start vector is a row of the token table, and the output head
    has a column for it.
    """
    layouts: dict[torch.Tensor, Layout] = {parameter: layout_of(parameter) for parameter in model.parameters()}
    for module in model.modules():
        layouts |= {parameter: layout_of(parameter, *axes) for parameter, *axes in _views(module)}
    return layouts


def _views(module: nn.Module) -> Iterator[tuple[torch.Tensor, tuple[int, ...], tuple[int, ...]]]:
    """Yields (parameter, sizes, order) for a module's own parameters that have another shape in the reference."""
    if isinstance(module, Attention):
        for projection in (module.query, module.key, module.value):
            yield from _attention(projection, module.out, module.num_heads, parts=1)
    elif _is_timm_attention(module):
        yield from _attention(module.qkv, module.proj, module.num_heads, parts=3)
    elif isinstance(module, PatchEmbed):  # (D, p p 3), theirs (p, p, 3, D)
        yield module.proj.weight, (-1, module.patch, module.patch, 3), (1, 2, 3, 0)
    elif isinstance(module, PatchLinear):  # (D, 3, p, p), theirs (p, p, 3, D)
        yield module.weight, tuple(module.weight.shape), (2, 3, 1, 0)
    elif isinstance(module, LabelEmbed):
        for embed in module.channels.values():
            if isinstance(embed, CategoricalEmbed):  # (P C, D), theirs (C, P, D)
                yield embed.weight, (module.patch**2, -1, embed.weight.shape[1]), (1, 0, 2)
            elif isinstance(embed, RealEmbed):  # (D, P C), theirs (C, P, D)
                yield embed.proj.weight, (embed.proj.out_features, module.patch**2, -1), (2, 1, 0)
    elif isinstance(module, LabelHead):
        for head in module.heads.values():  # (P C, D) and (P C), theirs (D, C, P) and (C, P)
            assert isinstance(head, nn.Linear)
            yield head.weight, (module.pixels, -1, head.in_features), (2, 1, 0)
            yield head.bias, (module.pixels, -1), (1, 0)


def _is_timm_attention(module: nn.Module) -> TypeGuard[TimmAttention]:
    # A model that contains such a module has imported timm already. Importing it here would take seconds.
    timm_attention = sys.modules.get("timm.layers.attention")
    return timm_attention is not None and isinstance(module, timm_attention.Attention)


def _attention(
    into: nn.Linear, out: nn.Linear, heads: int, *, parts: int
) -> Iterator[tuple[torch.Tensor, tuple[int, ...], tuple[int, ...]]]:
    """Layouts of an input map, which merges 1 or 3 `parts` (query, key, value), and of the output map."""
    yield into.weight, (parts, heads, -1, into.in_features), (0, 3, 1, 2)  # theirs (E, H, h) each
    if into.bias is not None:
        yield into.bias, (parts, heads, -1), (0, 1, 2)  # theirs (H, h) each
    yield out.weight, (out.out_features, heads, -1), (1, 2, 0)  # theirs (H, h, D)
