"""Estimates the training memory of a configuration, without allocating weights or reading data."""

from __future__ import annotations

import torch
from torch import nn

from uvim_fsq.benchmark.setup import with_categories
from uvim_fsq.checkpoints.loading import build_direct, build_lm, build_oracle, build_task
from uvim_fsq.config.schema import DirectRun, LMRun, OracleRun, Run
from uvim_fsq.direct.model import DirectModel
from uvim_fsq.lm.base import TokenModel
from uvim_fsq.oracle import chunking
from uvim_fsq.oracle.model import Oracle
from uvim_fsq.performance.memory import (
    TrainingMemory,
    decoder_activations,
    fixed_bytes,
    frozen_bytes,
    number_bytes,
    oracle_activations,
)


def _numbers(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _fixed(model: nn.Module, run: Run, processes: int) -> float:
    """Bytes that do not depend on the batch. Frozen parameters have neither gradients nor optimizer state."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return fixed_bytes(trained, run.train, run.optim, processes) + frozen_bytes(_numbers(model) - trained, run.train)


def oracle_memory(oracle: Oracle, run: Run, processes: int = 1) -> TrainingMemory:
    """Training memory of stage I. `oracle` may be on the meta device."""
    fixed = _fixed(oracle, run, processes)
    image = oracle_activations(oracle.config, oracle.image_size, number_bytes(run.train))
    return TrainingMemory(fixed, image, oracle.label_head.logits * oracle.num_patches, chunking.MAX_LOGITS)


def lm_memory(lm: TokenModel, oracle: Oracle, run: LMRun, processes: int = 1) -> TrainingMemory:
    """Training memory of stage II, frozen oracle included. The models may be on the meta device."""
    b = number_bytes(run.train)
    fixed = _fixed(lm, run, processes) + _numbers(oracle) * (4 + b)
    if not run.loss.task_weight:
        return TrainingMemory(fixed, lm.activation_bytes(b))
    # The gradient passes through the decoder, which saves its activations.
    frozen = lm.label_decoder is None
    image = lm.activation_bytes(b) + decoder_activations(oracle.config, oracle.image_size, b, frozen=frozen)
    return TrainingMemory(fixed, image, oracle.label_head.logits * oracle.num_patches, chunking.MAX_LOGITS)


def direct_memory(model: DirectModel, run: Run, processes: int = 1) -> TrainingMemory:
    """Training memory of the direct baseline. `model` may be on the meta device."""
    fixed = _fixed(model, run, processes)
    image = model.activation_bytes(number_bytes(run.train))
    return TrainingMemory(fixed, image, model.label_head.logits * model.num_patches, chunking.MAX_LOGITS)


def memory_of(run: OracleRun | DirectRun, lm_run: LMRun | None = None, processes: int = 1) -> TrainingMemory:
    """Training memory of a configuration: of stage II on the oracle `run` if `lm_run` is given, else of `run`."""
    run = with_categories(run)
    task = build_task(run)
    with torch.device("meta"):
        if isinstance(run, DirectRun):
            return direct_memory(build_direct(run, task, published=False), run, processes)
        oracle = build_oracle(run, task)
        if lm_run is None:
            return oracle_memory(oracle, run, processes)
        return lm_memory(build_lm(lm_run, oracle, published=False), oracle, lm_run, processes)
