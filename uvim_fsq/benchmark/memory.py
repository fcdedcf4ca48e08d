"""Bytes that one training process holds on its device, counted from the models' sizes: whether a batch will fit.

Counted: weights, gradients, optimizer state, and what the forward pass keeps for the backward pass, without
`torch.compile` (which keeps less). Symbols: d width, m MLP width, n patches (or memory tokens), t tokens, e memory
width, b bytes of a number in the forward pass: 2 under autocast, whose products each make a copy of their input, 4
without. Residual streams and norms are float32 in any case.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from uvim_fsq.benchmark.setup import with_categories
from uvim_fsq.config import LMRun, OptimConfig, OracleRun, Run, TrainConfig
from uvim_fsq.lm.model import LM
from uvim_fsq.models import build_lm, build_oracle, build_task
from uvim_fsq.oracle import labels
from uvim_fsq.oracle.model import Oracle

#: Bytes of each number of the label head's largest piece: logits, their float32 copy, log-softmax and gradients.
LOGIT_BYTES = 18
#: What the device's context, libraries and the allocator's rounding take of it beside the tensors.
OVERHEAD = 2e9


def encoder_block(d: int, m: int, n: int, b: int, *, fused: bool = False) -> float:
    """Kept by one block over n tokens. `fused`: query, key and value by one product, as timm does it."""
    inputs = 3 if b < 4 and not fused else 1  # copies of the normed stream for query, key and value
    attention = 4 + b * (inputs + 3 + 1)  # the stream; those copies; query, key, value; the weighted sum
    return (attention + 4 + b) * n * d + 2 * b * n * m


def decoder_block(d: int, m: int, e: int, t: int, n: int, b: int) -> float:
    """Kept by one LM block: causal self-attention, cross-attention to n memory tokens, MLP."""
    copies = 2 if b < 4 else 0  # of the memory, for keys and for values
    cross = (4 + 3 * b) * t * d + b * n * (copies * e + 2 * d)
    return encoder_block(d, m, t, b) + cross


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of a training process.

    Attributes:
        fixed: whatever the batch.
        image: for each image of a micro-batch.
        logits: numbers per image of which at most `labels.BUDGET` exist at a time; 0 for an LM.
    """

    fixed: float
    image: float
    logits: int = 0

    def of(self, micro_batch: int) -> float:
        """Bytes with that many images at a time."""
        return self.fixed + micro_batch * self.image + LOGIT_BYTES * min(labels.BUDGET, micro_batch * self.logits)


def _numbers(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _number_bytes(train: TrainConfig) -> int:
    return 4 if train.precision == "fp32" else 2


def _fixed(model: nn.Module, train: TrainConfig, optim: OptimConfig, processes: int) -> float:
    """Weights, gradients, optimizer state, copies for autocast and for exchange, and the average of the weights."""
    state = {"adamw": 8, "adafactor": 4}[optim.name]
    copies = 2 if train.precision != "fp32" else 0
    copies += 4 if processes > 1 else 0
    copies += 4 if train.ema is not None else 0
    return OVERHEAD + _numbers(model) * (4 + 4 + state + copies)


def oracle_memory(oracle: Oracle, run: Run, processes: int = 1) -> TrainingMemory:
    """Of stage I; `oracle` may lie on the meta device."""
    config, b = oracle.config, _number_bytes(run.train)
    d, n = config.width, oracle.num_patches
    blocks = (config.encoder_depth + config.decoder_depth) * encoder_block(d, config.mlp_dim, n, b)
    # The inputs of the two final norms, the hidden states, and the image's patches for both contexts.
    ends = (4 + 4 + 4) * n * d + 2 * 3 * b * oracle.image_size**2
    return TrainingMemory(_fixed(oracle, run.train, run.optim, processes), blocks + ends, oracle.label_head.logits * n)


def lm_memory(lm: LM, oracle: Oracle, run: Run, processes: int = 1) -> TrainingMemory:
    """Of stage II, with its frozen oracle; the models may lie on the meta device."""
    config, encoder, b = lm.config, lm.encoder, _number_bytes(run.train)
    e, n = encoder.num_features, encoder.patch_embed.num_patches
    blocks = list(encoder.blocks.children())
    hidden = int(blocks[0].get_submodule("mlp.fc1").get_parameter("weight").shape[0])
    image = len(blocks) * encoder_block(e, hidden, n, b, fused=True)
    image += config.depth * decoder_block(config.width, config.mlp_dim, e, lm.length, n, b)
    if config.dropout:
        image += config.depth * 3 * lm.length * config.width
    # Log-probabilities and the gradients of the logits; the encoder's final norm; the image's patches.
    image += 12 * lm.length * lm.vocab_size + 4 * n * e + 3 * b * n * encoder.patch_embed.patch_size[0] ** 2
    fixed = _fixed(lm, run.train, run.optim, processes) + _numbers(oracle) * (4 + b)
    return TrainingMemory(fixed, image)


def memory_of(oracle_run: OracleRun, lm_run: LMRun | None = None, processes: int = 1) -> TrainingMemory:
    """Of a configuration of either stage; no weights are made and no data are needed."""
    oracle_run = with_categories(oracle_run)
    task = build_task(oracle_run)
    with torch.device("meta"):
        oracle = build_oracle(oracle_run, task)
        if lm_run is None:
            return oracle_memory(oracle, oracle_run, processes)
        return lm_memory(build_lm(lm_run, oracle, published=False), oracle, lm_run, processes)


def smallest_accumulate(memory: TrainingMemory, train: TrainConfig, available: float, processes: int = 1) -> int | None:
    """The fewest micro-batches (at least `train.accumulate`) of `train.batch_size` with which a process fits into
    `available` bytes; None if not even single images fit."""
    for count in range(train.accumulate, train.batch_size + 1):
        # Even ones, unless the user's own will do.
        allowed = train.batch_size % count == 0 or count == train.accumulate
        if allowed and memory.of(-(-train.batch_size // (count * processes))) <= available:
            return count
    return None
