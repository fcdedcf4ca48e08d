"""FLOP and memory traffic of the models, and the roofline limits that follow from them.

A multiply-add counts as 2 FLOP. Norms, activations, softmax and the quantizer are not counted; they are below 1%.
Symbols: d width, m MLP width, N patches (or memory tokens), T tokens, e memory width, C classes or channels, P pixels
per patch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from uvim_fsq.config.schema import LMModelConfig, OracleModelConfig
from uvim_fsq.performance.device_peak import DevicePeak


def encoder_layer(d: int, m: int, n: int) -> float:
    """FLOP of one encoder block on n tokens: four projections, two MLP products, attention scores, weighted sum."""
    return 8 * d * d * n + 4 * d * m * n + 4 * n * n * d


def decoder_layer(d: int, m: int, e: int, t: int, n: int) -> float:
    """FLOP of one LM block on t tokens: causal self-attention (half of the scores), cross-attention to n, MLP."""
    projections = (8 + 4) * d * d * t + 4 * d * e * n
    return projections + 4 * d * m * t + 2 * t * t * d + 4 * t * n * d


@dataclass(frozen=True)
class OracleCost:
    """Forward FLOP per image of the parts of stage I.

    `label_embed` counts the dense product with one-hot labels, which is what the UViM reference code (big_vision, JAX)
    computes.
    """

    label_embed: float
    context: float
    encoder: float
    stems: float
    decoder: float
    head: float
    num_contexts: tuple[bool, bool]

    @property
    def tokenize(self) -> float:
        """FLOP of turning labels and image into tokens."""
        return self.label_embed + self.context * self.num_contexts[0] + self.encoder + self.stems / 2

    @property
    def decode(self) -> float:
        """FLOP of turning codes and image into label logits."""
        return self.stems / 2 + self.context * self.num_contexts[1] + self.decoder + self.head

    @property
    def forward(self) -> float:
        contexts = self.context * sum(self.num_contexts)
        return self.label_embed + contexts + self.encoder + self.stems + self.decoder + self.head

    @property
    def train(self) -> float:
        """Forward and backward: three times the forward pass, without the unneeded gradients of labels and images."""
        return 3 * self.forward - self.label_embed - self.context * sum(self.num_contexts)


def oracle_cost(config: OracleModelConfig, label_width: int, image_size: int, code_channels: int) -> OracleCost:
    """FLOP per image of stage I.

    Args:
        label_width: input size per pixel, summed over the label channels: the number of classes of a categorical
            channel, the number of values of a real one.
        code_channels: the quantizer's number of channels.
    """
    d, p = config.width, config.patch_size**2
    n = (image_size // config.patch_size) ** 2
    labels = 2 * d * label_width * p * n
    layer = encoder_layer(d, config.mlp_dim, n)
    return OracleCost(
        label_embed=labels,
        context=2 * d * 3 * p * n,
        encoder=config.encoder_depth * layer,
        stems=2 * 2 * d * code_channels * config.code_length,
        decoder=config.decoder_depth * layer,
        head=labels,
        num_contexts=(config.context in ("both", "encoder"), config.context in ("both", "decoder")),
    )


class TokenModelCost(ABC):
    """Cost of a token model: FLOP per image in training, memory traffic and time of generating tokens."""

    @property
    @abstractmethod
    def train(self) -> float:
        """FLOP per image, forward and backward, without the image's gradient and without the frozen oracle."""

    @abstractmethod
    def generate_bytes(self, batch: int, *, number_bytes: int, cross_bytes: float) -> float:
        """Bytes read while the tokens of `batch` images are generated, without the image encoder.

        Args:
            number_bytes: bytes per weight and per activation.
            cross_bytes: bytes per element of the cross-attention's keys and values.
        """

    @abstractmethod
    def generate_seconds(self, batch: int, peak: DevicePeak, *, number_bytes: int, cross_bytes: float) -> float:
        """Roofline limit: the shortest time in which a device with these peak rates generates the tokens of `batch`
        images greedily, image encoder included.
        """


@dataclass(frozen=True)
class AutoregressiveCost(TokenModelCost):
    """Cost of an encoder-decoder: forward FLOP per image of its parts, and the elements that a decoding step reads.

    Attributes:
        cross_kv: FLOP of computing the cross-attention's keys and values, once per image.
        step_weights: number of weights used by a decoding step.
        cross_numbers: cached elements of cross-attention keys and values per image.
        self_numbers: cached elements of self-attention keys and values per image and past token.
        length: number of tokens per image.
    """

    patch_embed: float
    encoder: float
    decoder: float
    cross_kv: float
    head: float
    step_weights: int
    cross_numbers: int
    self_numbers: int
    length: int

    @property
    def train(self) -> float:
        return 3 * (self.patch_embed + self.encoder + self.decoder + self.head) - self.patch_embed

    @property
    def encode(self) -> float:
        """FLOP spent once per image when decoding: the encoder and the cross-attention's keys and values."""
        return self.patch_embed + self.encoder + self.cross_kv

    def step_bytes(self, batch: int, past: int, *, number_bytes: int, cross_bytes: float) -> float:
        """Bytes read by one decoding step: all weights once, and for each image the cross-attention's keys and values
        and those of its `past` tokens.
        """
        own = self.self_numbers * past
        return self.step_weights * number_bytes + batch * (self.cross_numbers * cross_bytes + own * number_bytes)

    def generate_bytes(self, batch: int, *, number_bytes: int, cross_bytes: float) -> float:
        steps = range(1, self.length + 1)
        return sum(self.step_bytes(batch, past, number_bytes=number_bytes, cross_bytes=cross_bytes) for past in steps)

    def generate_seconds(self, batch: int, peak: DevicePeak, *, number_bytes: int, cross_bytes: float) -> float:
        # A step is bound by memory traffic or by arithmetic (2 FLOP per weight and per cached element).
        seconds = batch * self.encode / peak.flops
        for past in range(1, self.length + 1):
            size = self.step_bytes(batch, past, number_bytes=number_bytes, cross_bytes=cross_bytes)
            flop = 2 * batch * (self.step_weights + self.cross_numbers + self.self_numbers * past)
            seconds += max(size / peak.bandwidth, flop / peak.flops)
        return seconds


@dataclass(frozen=True)
class EncoderSize:
    """Sizes of a ViT. `patches` is the number of patches, `patch_size` their side in pixels."""

    width: int
    depth: int
    mlp_dim: int
    patch_size: int
    patches: int


def autoregressive_cost(
    encoder: EncoderSize, config: LMModelConfig, *, vocab_size: int, length: int
) -> AutoregressiveCost:
    """FLOP per image of stage II with the autoregressive token model."""
    e, n = encoder.width, encoder.patches
    d, m, t = config.width, config.mlp_dim, length
    layer = 8 * d * d + 2 * d * m - 2 * d * d  # self-attention, query and output of the cross-attention, MLP
    return AutoregressiveCost(
        patch_embed=2 * e * 3 * encoder.patch_size**2 * n,
        encoder=encoder.depth * encoder_layer(e, encoder.mlp_dim, n),
        decoder=config.depth * decoder_layer(d, m, e, t, n),
        cross_kv=config.depth * 4 * d * e * n,
        head=2 * d * vocab_size * t,
        step_weights=config.depth * layer + d * vocab_size,
        cross_numbers=config.depth * 2 * n * d,
        self_numbers=config.depth * 2 * d,
        length=t,
    )
