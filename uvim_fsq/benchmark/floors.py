"""What the models' mathematics costs, in floating-point operations and bytes, and the least time it can take.

A multiply-add counts 2. Norms, activations, softmax and the quantizer are left out: they are under 1%. Symbols: d
width, m MLP width, N patches (or memory tokens), T tokens, e memory width, C classes or channels, P pixels of a patch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from uvim_fsq.benchmark.ceilings import Ceilings
from uvim_fsq.config import OracleModelConfig
from uvim_fsq.lm.model import LM
from uvim_fsq.tasks.base import LabelChannel, Real


def encoder_layer(d: int, m: int, n: int) -> float:
    """FLOP of one block over n tokens: four projections, two MLP products, scores and weighted sum."""
    return 8 * d * d * n + 4 * d * m * n + 4 * n * n * d


def decoder_layer(d: int, m: int, e: int, t: int, n: int) -> float:
    """FLOP of one LM block over t tokens: causal self-attention (half of the scores), cross-attention to n, MLP."""
    projections = (8 + 4) * d * d * t + 4 * d * e * n
    return projections + 4 * d * m * t + 2 * t * t * d + 4 * t * n * d


def _label_width(channels: Mapping[str, LabelChannel]) -> int:
    return sum(channel.channels if isinstance(channel, Real) else channel.num_classes for channel in channels.values())


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


def oracle_cost(
    config: OracleModelConfig, channels: Mapping[str, LabelChannel], image_size: int, code_channels: int
) -> OracleCost:
    """Per image of stage I."""
    d, p = config.width, config.patch_size**2
    n = (image_size // config.patch_size) ** 2
    labels = 2 * d * _label_width(channels) * p * n
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
class LMCost:
    """FLOP per image of stage II's pieces, forward; and what one decoding step reads from memory, in numbers.

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
        """Forward and backward, without the gradient of the image. The frozen oracle comes on top."""
        return 3 * (self.patch_embed + self.encoder + self.decoder + self.head) - self.patch_embed

    @property
    def encode(self) -> float:
        """What decoding does once per image: the encoder, and keys and values of the cross-attention."""
        return self.patch_embed + self.encoder + self.cross_kv


def lm_cost(lm: LM) -> LMCost:
    """Per image of stage II."""
    config, encoder = lm.config, lm.encoder
    e, d, m, t = encoder.num_features, config.width, config.mlp_dim, lm.length
    patch = encoder.patch_embed.patch_size[0]
    n = encoder.patch_embed.num_patches
    blocks = list(encoder.blocks.children())
    encoder_mlp = int(blocks[0].get_submodule("mlp.fc1").get_parameter("weight").shape[0])
    layer = 8 * d * d + 2 * d * m - 2 * d * d  # self-attention, cross-attention's query and output, MLP
    return LMCost(
        patch_embed=2 * e * 3 * patch * patch * n,
        encoder=len(blocks) * encoder_layer(e, encoder_mlp, n),
        decoder=config.depth * decoder_layer(d, m, e, t, n),
        cross_kv=config.depth * 4 * d * e * n,
        head=2 * d * lm.vocab_size * t,
        step_weights=config.depth * layer + d * lm.vocab_size,
        cross_numbers=config.depth * 2 * n * d,
        self_numbers=config.depth * 2 * d,
        length=t,
    )


def step_bytes(cost: LMCost, batch: int, past: int, *, number_bytes: int, cross_bytes: float) -> float:
    """What a decoding step must read: all weights once, and each image's cross keys and values and those of the `past`
    tokens so far."""
    own = cost.self_numbers * past
    return cost.step_weights * number_bytes + batch * (cost.cross_numbers * cross_bytes + own * number_bytes)


def decode_seconds(cost: LMCost, batch: int, ceilings: Ceilings, *, number_bytes: int, cross_bytes: float) -> float:
    """Least seconds to decode `batch` images greedily with a cache, image encoder included.

    A step is bound by what it reads (`step_bytes`) or by arithmetic, 2 FLOP per weight and per cached number.
    """
    seconds = batch * cost.encode / ceilings.flops
    for past in range(1, cost.length + 1):
        size = step_bytes(cost, batch, past, number_bytes=number_bytes, cross_bytes=cross_bytes)
        flop = 2 * batch * (cost.step_weights + cost.cross_numbers + cost.self_numbers * past)
        seconds += max(size / ceilings.bandwidth, flop / ceilings.flops)
    return seconds
