"""Estimates the device memory of a training process from the models' sizes, to tell whether a batch fits.

Counts weights, gradients, optimizer state and the activations saved for the backward pass, without `torch.compile`
(which saves fewer). Symbols: d width, m MLP width, n patches (or memory tokens), t tokens, e memory width, b bytes per
element in the forward pass: 4, or 2 under autocast, where each matrix product also copies its input. Residual streams
and norms are always float32.
"""

from __future__ import annotations

from dataclasses import dataclass

from uvim_fsq.config.schema import DirectModelConfig, LMModelConfig, OptimConfig, OracleModelConfig, TrainConfig
from uvim_fsq.performance.flops import EncoderSize

#: Bytes per logit of the label head's largest chunk: the logit, its float32 copy, its log-softmax and gradients.
LOGIT_BYTES = 18
#: Bytes used besides the tensors: the device context, libraries and the allocator's rounding.
OVERHEAD = 2e9
#: The fraction of a device's memory that training may use; the rest is for fragmentation and peaks.
USABLE = 0.92


def encoder_block(d: int, m: int, n: int, b: int, *, fused: bool = False) -> float:
    """Bytes saved by one encoder block on n tokens. `fused`: one product computes query, key and value, as in timm."""
    inputs = 3 if b < 4 and not fused else 1  # copies of the normalized stream for query, key and value
    attention = 4 + b * (inputs + 3 + 1)  # the stream, those copies, query, key and value, the weighted sum
    return (attention + 4 + b) * n * d + 2 * b * n * m


def decoder_block(d: int, m: int, e: int, t: int, n: int, b: int) -> float:
    """Bytes saved by one LM block: self-attention, cross-attention to n memory tokens, MLP."""
    copies = 2 if b < 4 else 0  # copies of the memory, for keys and for values
    cross = (4 + 3 * b) * t * d + b * n * (copies * e + 2 * d)
    return encoder_block(d, m, t, b) + cross


@dataclass(frozen=True)
class TrainingMemory:
    """Device memory of a training process, in bytes.

    Attributes:
        fixed: bytes that do not depend on the batch.
        image: bytes per image of a micro-batch.
        logits: label logits per image; 0 for a token model.
        max_logits: the most label logits that exist at a time.
    """

    fixed: float
    image: float
    logits: int = 0
    max_logits: int = 0

    def of(self, micro_batch: int) -> float:
        """Bytes with `micro_batch` images at a time."""
        return self.fixed + micro_batch * self.image + LOGIT_BYTES * min(self.max_logits, micro_batch * self.logits)


def number_bytes(train: TrainConfig) -> int:
    """Bytes per element in the forward pass."""
    return 4 if train.precision == "fp32" else 2


def fixed_bytes(parameters: int, train: TrainConfig, optim: OptimConfig, processes: int) -> float:
    """Bytes of weights, gradients, optimizer state, autocast copies, gradient buckets and averaged weights."""
    state = {"adamw": 8, "adafactor": 4}[optim.name]
    copies = 2 if train.precision != "fp32" else 0
    copies += 4 if processes > 1 else 0
    copies += 4 if train.ema is not None else 0
    return OVERHEAD + parameters * (4 + 4 + state + copies)


def frozen_bytes(parameters: int, train: TrainConfig) -> float:
    """Bytes of frozen weights in the trained model: the weights, autocast copies and averaged weights."""
    copies = 2 if train.precision != "fp32" else 0
    return parameters * (4 + copies + (4 if train.ema is not None else 0))


def oracle_activations(config: OracleModelConfig, image_size: int, b: int) -> float:
    """Bytes per image saved for the oracle's backward pass, without label logits."""
    d, n = config.width, (image_size // config.patch_size) ** 2
    blocks = (config.encoder_depth + config.decoder_depth) * encoder_block(d, config.mlp_dim, n, b)
    # Inputs of the two final norms, hidden states, and the image's patches for both contexts.
    return blocks + (4 + 4 + 4) * n * d + 2 * 3 * b * image_size**2


def decoder_activations(config: OracleModelConfig, image_size: int, b: int, *, frozen: bool) -> float:
    """Bytes per image saved for the backward pass through an oracle's decoder, without label logits.

    Of a frozen one, the inputs of products with weights are not saved, because only the weights' gradients need them.
    """
    d, n = config.width, (image_size // config.patch_size) ** 2
    # Of a frozen block: the streams, whose norms need them; query, key and value, the weighted sum; the MLP.
    block = (4 + 4 + 3 * b + b) * n * d + b * n * config.mlp_dim
    if not frozen:
        block = encoder_block(d, config.mlp_dim, n, b)
    # Input of the final norm, and hidden states.
    return config.decoder_depth * block + (4 + 4) * n * d


def vit_activations(vit: EncoderSize, b: int) -> float:
    """Bytes per image saved for a plain ViT's backward pass."""
    e, n = vit.width, vit.patches
    # The input of the final norm and the image's patches, besides the blocks.
    return vit.depth * encoder_block(e, vit.mlp_dim, n, b, fused=True) + 4 * n * e + 3 * b * n * vit.patch_size**2


def encoder_decoder_activations(
    encoder_bytes: float, memory: tuple[int, int], config: LMModelConfig, *, vocab_size: int, length: int, b: int
) -> float:
    """Bytes per image saved for the backward pass of a built-in token model.

    Args:
        encoder_bytes: those of the image encoder.
        memory: (M, E), the number and width of its features.
    """
    n, e = memory
    image = encoder_bytes + config.depth * decoder_block(config.width, config.mlp_dim, e, length, n, b)
    if config.dropout:
        image += config.depth * 3 * length * config.width
    return image + 12 * length * vocab_size  # log-probabilities and gradients of the logits


def direct_activations(
    encoder_bytes: float, features: tuple[int, int], config: DirectModelConfig, image_size: int, b: int
) -> float:
    """Bytes per image saved for the direct baseline's backward pass, without label logits.

    Args:
        encoder_bytes: those of the image encoder.
        features: (M, E), the number and width of its features.
    """
    (m, e), d, n = features, config.width, (image_size // config.patch_size) ** 2
    image = encoder_bytes + config.depth * encoder_block(d, config.mlp_dim, n, b)
    # Inputs of the stem and of the final norm, hidden states.
    return image + b * m * e + (4 + 4) * n * d


def smallest_accumulate(memory: TrainingMemory, train: TrainConfig, available: float, processes: int = 1) -> int | None:
    """The smallest number of micro-batches, at least `train.accumulate`, with which a process fits into `available`
    bytes. None if not even the smallest micro-batches fit, of which every process gets at least one image.
    """
    for count in range(train.accumulate, train.batch_size // processes + 1):
        # Only divisors of the batch size, besides the user's own value.
        allowed = train.batch_size % count == 0 or count == train.accumulate
        if allowed and memory.of(-(-train.batch_size // (count * processes))) <= available:
            return count
    return None
