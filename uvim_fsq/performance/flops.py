"""What the models' arithmetic costs in floating-point operations and bytes, and the least time a device needs for it.

A multiply-add counts 2. Norms, activations, softmax and the quantizer are left out: they are under 1%. Symbols: d
width, m MLP width, N patches (or memory tokens), T tokens, e memory width, C classes or channels, P pixels of a patch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from uvim_fsq.config.schema import LMModelConfig, OracleModelConfig
from uvim_fsq.performance.device_peak import DevicePeak


def encoder_layer(d: int, m: int, n: int) -> float:
    """FLOP of one block over n tokens: four projections, two MLP products, scores and weighted sum."""
    return 8 * d * d * n + 4 * d * m * n + 4 * n * n * d


def decoder_layer(d: int, m: int, e: int, t: int, n: int) -> float:
    """FLOP of one LM block over t tokens: causal self-attention (half of the scores), cross-attention to n, MLP."""
    projections = (8 + 4) * d * d * t + 4 * d * e * n
    return projections + 4 * d * m * t + 2 * t * t * d + 4 * t * n * d


@dataclass(frozen=True)
class OracleCost:
    """FLOP per image of stage I's pieces, forward.

    `label_embed` is counted as the dense product of one-hot labels, as the reference computes it.
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
        """Labels and image to tokens."""
        return self.label_embed + self.context * self.num_contexts[0] + self.encoder + self.stems / 2

    @property
    def forward(self) -> float:
        contexts = self.context * sum(self.num_contexts)
        return self.label_embed + contexts + self.encoder + self.stems + self.decoder + self.head

    @property
    def train(self) -> float:
        """Forward and backward: three times the forward, less the gradients of labels and images, that nobody needs."""
        return 3 * self.forward - self.label_embed - self.context * sum(self.num_contexts)


def oracle_cost(config: OracleModelConfig, label_width: int, image_size: int, code_channels: int) -> OracleCost:
    """Per image of stage I.

    Args:
        label_width: numbers per pixel over all label channels: classes of categorical ones, values of real ones.
        code_channels: d of the quantizer.
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
    """What a token model costs: FLOP per image in training, and what generating tokens takes."""

    @property
    @abstractmethod
    def train(self) -> float:
        """FLOP per image, forward and backward, without the gradient of the image. The frozen oracle comes on top."""

    @abstractmethod
    def generate_bytes(self, batch: int, *, number_bytes: int, cross_bytes: float) -> float:
        """Bytes that generating the tokens of `batch` images must read, the image encoder's left out.

        Args:
            number_bytes: of a weight or activation.
            cross_bytes: of a number of the cross-attention's keys and values.
        """

    @abstractmethod
    def generate_seconds(self, batch: int, peak: DevicePeak, *, number_bytes: int, cross_bytes: float) -> float:
        """The least time in which a device generates the tokens of `batch` images greedily, encoder included."""


@dataclass(frozen=True)
class AutoregressiveCost(TokenModelCost):
    """FLOP per image of an encoder-decoder's parts, forward, and what one decoding step reads, in numbers.

    Attributes:
        cross_kv: FLOP of the cross-attention's keys and values, once per image.
        step_weights: weights that a decoding step multiplies with.
        cross_numbers, self_numbers: keys and values per image, and per image and past token.
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
        """What decoding does once per image: the encoder, and keys and values of the cross-attention."""
        return self.patch_embed + self.encoder + self.cross_kv

    def step_bytes(self, batch: int, past: int, *, number_bytes: int, cross_bytes: float) -> float:
        """Bytes that one decoding step must read: all weights once, each image's cross-attention keys and values, and
        those of its `past` tokens."""
        own = self.self_numbers * past
        return self.step_weights * number_bytes + batch * (self.cross_numbers * cross_bytes + own * number_bytes)

    def generate_bytes(self, batch: int, *, number_bytes: int, cross_bytes: float) -> float:
        steps = range(1, self.length + 1)
        return sum(self.step_bytes(batch, past, number_bytes=number_bytes, cross_bytes=cross_bytes) for past in steps)

    def generate_seconds(self, batch: int, peak: DevicePeak, *, number_bytes: int, cross_bytes: float) -> float:
        # A step is bound by what it reads, or by arithmetic: 2 FLOP per weight and per cached number.
        seconds = batch * self.encode / peak.flops
        for past in range(1, self.length + 1):
            size = self.step_bytes(batch, past, number_bytes=number_bytes, cross_bytes=cross_bytes)
            flop = 2 * batch * (self.step_weights + self.cross_numbers + self.self_numbers * past)
            seconds += max(size / peak.bandwidth, flop / peak.flops)
        return seconds


@dataclass(frozen=True)
class EncoderSize:
    """Sizes of a ViT: `width`, `depth` blocks, `mlp_dim`, and `patches` of `patch_size` pixels side."""

    width: int
    depth: int
    mlp_dim: int
    patch_size: int
    patches: int


def autoregressive_cost(
    encoder: EncoderSize, config: LMModelConfig, *, vocab_size: int, length: int
) -> AutoregressiveCost:
    """Per image of stage II with the autoregressive token model."""
    e, n = encoder.width, encoder.patches
    d, m, t = config.width, config.mlp_dim, length
    layer = 8 * d * d + 2 * d * m - 2 * d * d  # self-attention, cross-attention's query and output, MLP
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
