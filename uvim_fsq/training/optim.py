"""Optimizers and the learning rate as one pure function of the step. Knows nothing of stages."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from timm.optim.adafactor_bv import AdafactorBigVision
from torch import nn

from uvim_fsq.config import OptimConfig

#: Parameters that are no kernels, whatever their shape: positions, start vector, tables.
NO_DECAY = ("positions", "pos_embed", "start", "token_embedding", "norm")


def learning_rate(step: int, total: int, optim: OptimConfig) -> float:
    """Linear warm-up from 0 over `warmup_steps`, then a cosine to `final_lr_ratio` at `total`; step counts from 0."""
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    progress = (step - optim.warmup_steps) / max(1, total - optim.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return optim.lr * (optim.final_lr_ratio + (1 - optim.final_lr_ratio) * cosine)


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: kernels only (REFERENCE: decoupled, on kernels)."""
    return parameter.ndim >= 2 and not any(part in name for part in NO_DECAY)


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], optim: OptimConfig, stage: str) -> list[dict[str, Any]]:
    """Groups by decay and rate; `lr_ratio` multiplies the schedule's rate (LM: `encoder.` learns slower)."""
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        ratio = optim.encoder_lr_ratio if stage == "lm" and name.startswith("encoder.") else 1.0
        groups.setdefault((decays(name, parameter), ratio), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": optim.weight_decay if decay else 0.0, "lr_ratio": ratio, "lr": optim.lr}
        for (decay, ratio), parameters in groups.items()
    ]


def build_optimizer(named: Iterable[tuple[str, nn.Parameter]], optim: OptimConfig, stage: str) -> torch.optim.Optimizer:
    """adamw (fused) or adafactor, big_vision's variant as timm carries it (momentum in bf16)."""
    groups = parameter_groups(named, optim, stage)
    if optim.name == "adamw":
        return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, fused=True)
    return AdafactorBigVision(
        groups,
        lr=optim.lr,
        min_dim_size_to_factor=32,
        decay_rate=0.8,
        beta2_cap=optim.betas[1],
        momentum=optim.betas[0],
        momentum_dtype=torch.bfloat16,
        clipping_threshold=None,
        unscaled_wd=False,
    )


def set_rates(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Writes the schedule's rate into every group, times its ratio."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_ratio"]
