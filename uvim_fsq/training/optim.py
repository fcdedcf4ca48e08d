"""The learning rate schedule, parameter groups and optimizers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from uvim_fsq.config.schema import OptimConfig
from uvim_fsq.errors import UserError
from uvim_fsq.layers import Layered
from uvim_fsq.lm.image_encoder import ImageEncoder
from uvim_fsq.training.adafactor import Adafactor
from uvim_fsq.training.layouts import reference_layouts


def schedule(step: int, total: int, optim: OptimConfig) -> float:
    """The learning rate of update `step` of `total`, counted from 0, as a fraction of the peak rate in [0, 1].

    Linear warmup from 0 over `warmup_steps`, then a cosine from 1 down to `final_lr_ratio`.
    """
    if step < optim.warmup_steps:
        return step / optim.warmup_steps
    progress = (step - optim.warmup_steps) / max(1, total - optim.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return optim.final_lr_ratio + (1 - optim.final_lr_ratio) * cosine


def learning_rate(step: int, total: int, optim: OptimConfig) -> float:
    """The learning rate of update `step` of `total`, counted from 0."""
    return optim.lr * schedule(step, total, optim)


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: only to kernels, not to tables, positions or biases (as in the reference code)."""
    return parameter.ndim >= 2 and name.endswith("weight") and name != "token_embedding.weight"


def parameter_groups(model: nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
    """Parameter groups by weight decay and learning rate, without frozen parameters.

    A group's `lr_ratio` multiplies the scheduled rate. For the timm model of an `ImageEncoder`, it is
    `optim.encoder_lr_ratio`, times `optim.encoder_layer_decay` for each layer above. The encoder's new layers, such as
    its projection, learn at the full rate. For the layers of a `Layered` model it is `optim.layer_decay` for each layer
    above; what it does not count as a layer learns at the full rate.

    Without layer-wise decay, the assignment of parameters to groups does not depend on `optim`, so that a saved state
    can be loaded after these settings change.

    Raises UserError for layer-wise decay of a model whose layers have no known order.
    """
    places = _places(model, optim)
    groups: dict[tuple[bool, _Place | None], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((decays(name, parameter), places.get(parameter)), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": optim.weight_decay if decay else 0.0,
            "lr_ratio": 1.0 if place is None else place.lr_ratio(optim),
            "lr": optim.lr,
        }
        for (decay, place), parameters in groups.items()
    ]


class _Place(NamedTuple):
    """Where a parameter is: in an image encoder's timm model or not, and how many layers are above it."""

    in_encoder: bool
    depth: int

    def lr_ratio(self, optim: OptimConfig) -> float:
        if self.in_encoder:
            return optim.encoder_lr_ratio * optim.encoder_layer_decay**self.depth
        return optim.layer_decay**self.depth


def _places(model: nn.Module, optim: OptimConfig) -> dict[nn.Parameter, _Place]:
    """The places of all parameters whose rate may differ; the depth is 0 without layer-wise decay."""
    places: dict[nn.Parameter, _Place] = {}
    if optim.layer_decay != 1:
        places |= {parameter: _Place(False, depth) for parameter, depth in _own_depths(model).items()}
    for encoder in (module for module in model.modules() if isinstance(module, ImageEncoder)):
        flat = optim.encoder_layer_decay == 1
        depths = dict.fromkeys(encoder.model.parameters(), 0) if flat else encoder.depths()
        places |= {parameter: _Place(True, depth) for parameter, depth in depths.items()}
    return places


def _own_depths(model: nn.Module) -> dict[nn.Parameter, int]:
    """The number of layers above each parameter that `Layered` models count as part of a layer."""
    depths: dict[nn.Parameter, int] = {}
    layered = [module for module in model.modules() if isinstance(module, Layered)]
    if not layered:
        raise UserError(f"optim.layer_decay: {type(model).__name__} does not order its layers; use 1")
    for part in layered:
        for depth, layer in enumerate(reversed(part.layer_order())):
            for item in layer:
                found = [item] if isinstance(item, nn.Parameter) else [] if item is None else item.parameters()
                depths |= dict.fromkeys(found, depth)
    return depths


def build_optimizer(model: nn.Module, optim: OptimConfig) -> torch.optim.Optimizer:
    """Builds AdamW or Adafactor.

    AdamW scales weight decay by the learning rate. Adafactor, as in the UViM reference code, scales it by the schedule
    alone.

    Args:
        model: the model.
        optim: `optim.name` is "adamw" or "adafactor".
    """
    groups = parameter_groups(model, optim)
    if optim.name == "adamw":
        return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, fused=True)
    return Adafactor(groups, reference_layouts(model), betas=optim.betas)


def set_rates(optimizer: torch.optim.Optimizer, peak: float, fraction: float) -> None:
    """Sets every group's learning rate to `peak * fraction * lr_ratio`; `fraction` comes from `schedule`."""
    for group in optimizer.param_groups:
        group["lr"], group["schedule"] = peak * fraction * group["lr_ratio"], fraction


def load_optimizers(optimizers: Mapping[str, torch.optim.Optimizer], saved: Mapping[str, dict[str, Any]]) -> None:
    """Loads moments and step counts of saved states by optimizer name. Rates and decay stay as configured.

    Raises UserError if the saved states belong to a different model or stage.
    """
    other = UserError("the saved optimizer state belongs to a different model; training cannot resume from it")
    if saved.keys() != optimizers.keys():
        raise other
    for name, optimizer in optimizers.items():
        groups = optimizer.state_dict()["param_groups"]
        if [group["params"] for group in groups] != [group["params"] for group in saved[name]["param_groups"]]:
            raise other
        optimizer.load_state_dict({"state": saved[name]["state"], "param_groups": groups})
