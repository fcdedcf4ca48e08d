"""The schedule as a pure function of the step, parameter groups, and the choice of the optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from uvim_fsq.config.schema import OptimConfig
from uvim_fsq.errors import UserError
from uvim_fsq.training.adafactor import Adafactor
from uvim_fsq.training.layouts import reference_layouts


def schedule(step: int, total: int, optim: OptimConfig) -> float:
    """Share of the peak rate in the step-th update of `total`, counted from 0.

    Linear from 0 over `warmup_steps`, then a cosine from 1 down to `final_lr_ratio`.
    """
    if step < optim.warmup_steps:
        return step / optim.warmup_steps
    progress = (step - optim.warmup_steps) / max(1, total - optim.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return optim.final_lr_ratio + (1 - optim.final_lr_ratio) * cosine


def learning_rate(step: int, total: int, optim: OptimConfig) -> float:
    """Rate of the step-th update of `total`, counted from 0."""
    return optim.lr * schedule(step, total, optim)


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: to kernels only, as the reference. Tables, positions and biases are none."""
    return parameter.ndim >= 2 and name.endswith("weight") and name != "token_embedding.weight"


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], optim: OptimConfig, stage: str) -> list[dict[str, Any]]:
    """Groups by decay and rate; `lr_ratio` multiplies the schedule's rate (LM: `encoder.` learns slower).

    Which parameter is in which group does not depend on `optim`, so that a saved state fits another.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in named:
        if parameter.requires_grad:
            in_encoder = stage == "lm" and name.startswith("encoder.")
            groups.setdefault((decays(name, parameter), in_encoder), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": optim.weight_decay if decay else 0.0,
            "lr_ratio": optim.encoder_lr_ratio if in_encoder else 1.0,
            "lr": optim.lr,
        }
        for (decay, in_encoder), parameters in groups.items()
    ]


def build_optimizer(model: nn.Module, optim: OptimConfig, stage: str) -> torch.optim.Optimizer:
    """adamw (torch's, fused: decay times the rate) or adafactor (the reference's: decay times the schedule alone)."""
    groups = parameter_groups(model.named_parameters(), optim, stage)
    if optim.name == "adamw":
        return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, fused=True)
    return Adafactor(groups, reference_layouts(model), betas=optim.betas)


def set_rates(optimizer: torch.optim.Optimizer, peak: float, share: float) -> None:
    """Writes the schedule's `share` of the peak rate into every group, the rate times the group's ratio."""
    for group in optimizer.param_groups:
        group["lr"], group["schedule"] = peak * share * group["lr_ratio"], share


def load_optimizers(optimizers: Mapping[str, torch.optim.Optimizer], saved: Mapping[str, dict[str, Any]]) -> None:
    """Takes over the moments and counts of saved states, by name; rates and decay stay those of the configuration.

    Raises UserError where the saved states are of another model or stage.
    """
    other = UserError("the saved optimizer state is of another model; its training cannot go on from it")
    if saved.keys() != optimizers.keys():
        raise other
    for name, optimizer in optimizers.items():
        groups = optimizer.state_dict()["param_groups"]
        if [group["params"] for group in groups] != [group["params"] for group in saved[name]["param_groups"]]:
            raise other
        optimizer.load_state_dict({"state": saved[name]["state"], "param_groups": groups})
