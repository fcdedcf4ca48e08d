"""FLOP and memory traffic of the models, and the roofline limits that follow from them.

A multiply-add counts as 2 FLOP. Norms, activations, softmax and the quantizer are not counted; they are below 1%.
Symbols: d width, m MLP width, N patches (or memory tokens), T tokens, e memory width, C classes or channels, P pixels
per patch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from uvim_fsq.config.schema import DirectModelConfig, LMModelConfig, OracleModelConfig
from uvim_fsq.performance.device_peak import DevicePeak


def encoder_layer(d: int, m: int, n: int) -> float:
    """FLOP of one encoder block on n tokens: four projections, two MLP products, attention scores, weighted sum."""
    return 8 * d * d * n + 4 * d * m * n + 4 * n * n * d


def decoder_layer(d: int, m: int, e: int, t: int, n: int, *, causal: bool = True) -> float:
    """FLOP of one LM block on t tokens: self-attention (half of the scores if causal), cross-attention to n, MLP."""
    projections = (8 + 4) * d * d * t + 4 * d * e * n
    return projections + 4 * d * m * t + (2 if causal else 4) * t * t * d + 4 * t * n * d


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


@dataclass(frozen=True)
class EncoderSize:
    """Sizes of a ViT. `patches` is the number of patches, `patch_size` their side in pixels."""

    width: int
    depth: int
    mlp_dim: int
    patch_size: int
    patches: int


@dataclass(frozen=True)
class EncoderCost:
    """FLOP of an image encoder per image, and the size of its output.

    Attributes:
        width: channels of a feature.
        patches: features per image.
        forward: FLOP of the forward pass.
        train: FLOP of forward and backward pass, without the image's gradient.
    """

    width: int
    patches: int
    forward: float
    train: float


def vit_cost(vit: EncoderSize) -> EncoderCost:
    """The cost of a plain ViT."""
    patch_embed = 2 * vit.width * 3 * vit.patch_size**2 * vit.patches
    forward = patch_embed + vit.depth * encoder_layer(vit.width, vit.mlp_dim, vit.patches)
    return EncoderCost(width=vit.width, patches=vit.patches, forward=forward, train=3 * forward - patch_embed)


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
class EncoderDecoderCost(TokenModelCost):
    """Cost of an encoder-decoder: forward FLOP per image of its parts, and the elements that a decoding step reads.

    Attributes:
        cross_kv: FLOP of computing the cross-attention's keys and values, once per image.
        step_weights: number of weights used by a decoding step.
        cross_numbers: cached elements of cross-attention keys and values per image.
        length: number of tokens per image.
    """

    image_encoder: EncoderCost
    decoder: float
    cross_kv: float
    head: float
    step_weights: int
    cross_numbers: int
    length: int

    @property
    def train(self) -> float:
        return self.image_encoder.train + 3 * (self.decoder + self.head)

    @property
    def encode(self) -> float:
        """FLOP spent once per image when decoding: the encoder and the cross-attention's keys and values."""
        return self.image_encoder.forward + self.cross_kv


@dataclass(frozen=True)
class AutoregressiveCost(EncoderDecoderCost):
    """Cost of an encoder-decoder that predicts one token per step.

    Attributes:
        self_numbers: cached elements of self-attention keys and values per image and past token.
    """

    self_numbers: int

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
class MaskedCost(EncoderDecoderCost):
    """Cost of an encoder-decoder that predicts several tokens per step, from a pass over all positions.

    Attributes:
        predicted: the number of positions that each step predicts.
    """

    predicted: tuple[int, ...]

    def step_bytes(self, batch: int, *, number_bytes: int, cross_bytes: float) -> float:
        """Bytes read by one decoding step: all weights, and the cross-attention's keys and values of each image."""
        return self.step_weights * number_bytes + batch * self.cross_numbers * cross_bytes

    def step_flop(self, predicted: int) -> float:
        """FLOP per image of one decoding step: the decoder at all positions, the head at the predicted ones."""
        return self.decoder - self.cross_kv + self.head * predicted / self.length

    def generate_bytes(self, batch: int, *, number_bytes: int, cross_bytes: float) -> float:
        return len(self.predicted) * self.step_bytes(batch, number_bytes=number_bytes, cross_bytes=cross_bytes)

    def generate_seconds(self, batch: int, peak: DevicePeak, *, number_bytes: int, cross_bytes: float) -> float:
        # As for the autoregressive model, a step is bound by memory traffic or by arithmetic.
        traffic = self.step_bytes(batch, number_bytes=number_bytes, cross_bytes=cross_bytes) / peak.bandwidth
        steps = (max(traffic, batch * self.step_flop(count) / peak.flops) for count in self.predicted)
        return batch * self.encode / peak.flops + sum(steps)


def autoregressive_cost(
    encoder: EncoderCost, config: LMModelConfig, *, vocab_size: int, length: int
) -> AutoregressiveCost:
    """FLOP per image of stage II with the autoregressive token model."""
    parts = _encoder_decoder_parts(encoder, config, vocab_size, length, causal=True)
    return AutoregressiveCost(**parts, self_numbers=config.depth * 2 * config.width)


def masked_cost(
    encoder: EncoderCost, config: LMModelConfig, *, vocab_size: int, length: int, predicted: tuple[int, ...]
) -> MaskedCost:
    """FLOP per image of stage II with the masked token model, which predicts `predicted` positions in each step."""
    parts = _encoder_decoder_parts(encoder, config, vocab_size, length, causal=False)
    return MaskedCost(**parts, predicted=predicted)


def _encoder_decoder_parts(
    encoder: EncoderCost, config: LMModelConfig, vocab_size: int, length: int, *, causal: bool
) -> dict[str, Any]:
    """The fields of `EncoderDecoderCost`."""
    e, n = encoder.width, encoder.patches
    d, m, t = config.width, config.mlp_dim, length
    layer = 8 * d * d + 2 * d * m - 2 * d * d  # self-attention, query and output of the cross-attention, MLP
    return {
        "image_encoder": encoder,
        "decoder": config.depth * decoder_layer(d, m, e, t, n, causal=causal),
        "cross_kv": config.depth * 4 * d * e * n,
        "head": 2 * d * vocab_size * t,
        "step_weights": config.depth * layer + d * vocab_size,
        "cross_numbers": config.depth * 2 * n * d,
        "length": t,
    }


@dataclass(frozen=True)
class DirectCost:
    """Forward FLOP per image of the parts of the direct baseline."""

    image_encoder: EncoderCost
    stem: float
    blocks: float
    head: float

    @property
    def forward(self) -> float:
        return self.image_encoder.forward + self.stem + self.blocks + self.head

    @property
    def train(self) -> float:
        """Forward and backward, without the image's gradient."""
        return self.image_encoder.train + 3 * (self.stem + self.blocks + self.head)


def direct_cost(encoder: EncoderCost, config: DirectModelConfig, label_width: int, image_size: int) -> DirectCost:
    """FLOP per image of the direct baseline; `label_width` as in `oracle_cost`."""
    e, d, p = encoder.width, config.width, config.patch_size**2
    n = (image_size // config.patch_size) ** 2
    return DirectCost(
        image_encoder=encoder,
        stem=2 * e * d * encoder.patches,
        blocks=config.depth * encoder_layer(d, config.mlp_dim, n),
        head=2 * d * label_width * p * n,
    )
