"""Bytes that one training process holds on its device, counted from the models' sizes: whether a batch will fit.

Counted: weights, gradients, optimizer state, and what the forward pass keeps for the backward pass, without
`torch.compile` (which keeps less). Symbols: d width, m MLP width, n patches (or memory tokens), t tokens, e memory
width, b bytes of a number in the forward pass: 2 under autocast, whose matrix products each copy their input, 4
without. Residual streams and norms are float32 in any case.
"""

from __future__ import annotations

from dataclasses import dataclass

from uvim_fsq.config.schema import LMModelConfig, OptimConfig, OracleModelConfig, TrainConfig
from uvim_fsq.performance.flops import EncoderSize

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
        logits: label logits per image, of which at most `max_logits` exist at a time; 0 for a token model.
    """

    fixed: float
    image: float
    logits: int = 0
    max_logits: int = 0

    def of(self, micro_batch: int) -> float:
        """Bytes with that many images at a time."""
        return self.fixed + micro_batch * self.image + LOGIT_BYTES * min(self.max_logits, micro_batch * self.logits)


def number_bytes(train: TrainConfig) -> int:
    """Bytes of a number in the forward pass."""
    return 4 if train.precision == "fp32" else 2


def fixed_bytes(parameters: int, train: TrainConfig, optim: OptimConfig, processes: int) -> float:
    """Weights, gradients, optimizer state, copies for autocast and for exchange, and the average of the weights."""
    state = {"adamw": 8, "adafactor": 4}[optim.name]
    copies = 2 if train.precision != "fp32" else 0
    copies += 4 if processes > 1 else 0
    copies += 4 if train.ema is not None else 0
    return OVERHEAD + parameters * (4 + 4 + state + copies)


def oracle_activations(config: OracleModelConfig, image_size: int, b: int) -> float:
    """Bytes per image that the oracle keeps for its backward pass, label logits left out."""
    d, n = config.width, (image_size // config.patch_size) ** 2
    blocks = (config.encoder_depth + config.decoder_depth) * encoder_block(d, config.mlp_dim, n, b)
    # The inputs of the two final norms, the hidden states, and the image's patches for both contexts.
    return blocks + (4 + 4 + 4) * n * d + 2 * 3 * b * image_size**2


def autoregressive_activations(
    encoder: EncoderSize, config: LMModelConfig, *, vocab_size: int, length: int, b: int
) -> float:
    """Bytes per image that the autoregressive token model keeps for its backward pass."""
    e, n = encoder.width, encoder.patches
    image = encoder.depth * encoder_block(e, encoder.mlp_dim, n, b, fused=True)
    image += config.depth * decoder_block(config.width, config.mlp_dim, e, length, n, b)
    if config.dropout:
        image += config.depth * 3 * length * config.width
    # Log-probabilities and the gradients of the logits; the encoder's final norm; the image's patches.
    return image + 12 * length * vocab_size + 4 * n * e + 3 * b * n * encoder.patch_size**2


def smallest_accumulate(memory: TrainingMemory, train: TrainConfig, available: float, processes: int = 1) -> int | None:
    """The fewest micro-batches (at least `train.accumulate`) of `train.batch_size` with which a process fits into
    `available` bytes; None if not even single images fit."""
    for count in range(train.accumulate, train.batch_size + 1):
        # Even ones, unless the user's own will do.
        allowed = train.batch_size % count == 0 or count == train.accumulate
        if allowed and memory.of(-(-train.batch_size // (count * processes))) <= available:
            return count
    return None
