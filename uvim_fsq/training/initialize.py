"""Starts a model from the weights of another run (`init_from`): what fits by name and shape is taken."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from uvim_fsq.checkpoints.files import read_weights
from uvim_fsq.checkpoints.run_directory import recorded_hashes, resolve_checkpoint
from uvim_fsq.config.schema import Run
from uvim_fsq.console import say
from uvim_fsq.errors import UserError
from uvim_fsq.lm.image_encoder import ImageEncoder

#: Groups of names that a line lists; the rest are counted.
SHOWN = 6
#: The names of an LM's trained decoder begin with this.
DECODER = "label_decoder."


@dataclass(frozen=True)
class Match:
    """How the tensors of a file fit a model.

    Attributes:
        taken: names that both have in the same shape.
        reshaped: name -> (shape in the file, shape in the model), of those with different shapes.
        missing: names that the file lacks.
        unused: names that the model lacks, or must not take.
    """

    taken: list[str]
    reshaped: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    missing: list[str]
    unused: list[str]


def match(model: nn.Module, state: Mapping[str, torch.Tensor]) -> Match:
    """Compares a model's tensors with those of a file, by name and shape.

    The mean and deviation of an image encoder belong to its weights, so they are taken with most of these or not.
    """
    own = model.state_dict()
    shared = [name for name in own if name in state]
    taken = {name for name in shared if own[name].shape == state[name].shape}
    statistics: set[str] = set()
    for prefix, module in model.named_modules():
        if isinstance(module, ImageEncoder):
            sizes = {f"{prefix}.model.{name}": p.numel() for name, p in module.model.named_parameters()}
            if 2 * sum(size for name, size in sizes.items() if name in taken) < sum(sizes.values()):
                statistics |= {f"{prefix}.mean", f"{prefix}.std"} & taken
    return Match(
        taken=[name for name in shared if name in taken - statistics],
        reshaped={name: (tuple(state[name].shape), tuple(own[name].shape)) for name in shared if name not in taken},
        missing=[name for name in own if name not in state],
        unused=[name for name in state if name not in own],
    )


def initialize(model: nn.Module, run: Run, oracle: str | None = None) -> str:
    """Copies the weights that fit from the run that `init_from` names into `model`, and prints what was not taken.

    An LM's trained decoder reads the codes of one oracle. It is taken only from an LM on the same oracle.

    Args:
        model: a freshly initialized model.
        run: its configuration, completed by `inherit`: `ancestors` begins with the checkpoint to take.
        oracle: SHA-256 of the weights of an LM's oracle.

    Returns the SHA-256 of the file. Raises UserError if nothing fits, if a frozen image encoder would stay random, and
    if the file is damaged or was replaced since the configuration was completed.
    """
    source = run.ancestors[0]
    checkpoint = resolve_checkpoint(run.init_from)
    state, digest = read_weights(checkpoint)
    if digest != source.weights:
        raise UserError(
            f"init_from={run.init_from}: {source.run} was replaced while this training started; start again"
        )
    found = match(model, state)
    if recorded_hashes(checkpoint).get("oracle") != oracle:
        foreign = [name for name in found.taken if name.startswith(DECODER)]
        rest = [name for name in found.taken if name not in foreign]
        found = replace(found, taken=rest, unused=[*found.unused, *foreign])
    parameters = {name: p.numel() for name, p in model.named_parameters()}
    taken = sum(parameters.get(name, 0) for name in found.taken)
    if not taken:
        raise UserError(
            f"init_from={run.init_from}: none of its weights fits this model by name and shape; give a run with the "
            "same widths, or leave init_from out"
        )
    _refuse_random_frozen(model, run, set(found.taken))
    model.load_state_dict({**model.state_dict(), **{name: state[name] for name in found.taken}})
    share = 100 * taken / sum(parameters.values())
    say(f"init_from: {len(found.taken)} tensors, {share:.1f}% of the parameters, from {source.run} ({digest[:12]})")
    for line in describe(found):
        say(f"  {line}")
    return digest


def _refuse_random_frozen(model: nn.Module, run: Run, taken: set[str]) -> None:
    for prefix, module in model.named_modules():
        if isinstance(module, ImageEncoder) and module.config.frozen and module.config.weights == "none":
            lacking = [name for name, _ in module.model.named_parameters() if f"{prefix}.model.{name}" not in taken]
            if lacking:
                raise UserError(
                    f"model.encoder.frozen=true, but init_from={run.init_from} has no {prefix}.model.{lacking[0]} of "
                    "this shape, which would stay random; give the encoder's own weights, or set frozen to false"
                )


def describe(found: Match) -> list[str]:
    """What was not taken, in at most three lines."""
    shapes = [f"{name} {list(before)} -> {list(after)}" for name, (before, after) in found.reshaped.items()]
    lines = [("of another shape, so new", shapes), ("not in it, so new", grouped(found.missing))]
    lines.append(("of it not used", grouped(found.unused)))
    return [
        f"{title}: {', '.join(items[:SHOWN])}" + (f" and {len(items) - SHOWN} more" if len(items) > SHOWN else "")
        for title, items in lines
        if items
    ]


def grouped(names: Iterable[str]) -> list[str]:
    """Names in a short form, one for the tensors of a module and for the modules of equal blocks.

    For example "blocks.*.attn.query (24 tensors)", in the order of their first tensor.
    """
    counts: dict[str, int] = {}
    for name in names:
        module = re.sub(r"\.\d+(?=\.)", ".*", f".{name.rpartition('.')[0] or name}.").strip(".")
        counts[module] = counts.get(module, 0) + 1
    return [f"{module} ({count} tensors)" if count > 1 else module for module, count in counts.items()]
