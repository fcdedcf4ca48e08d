"""From images to predictions through a token model: tokens, the codes made of them, and what the oracle decodes.

The settings are `eval.codes`, `eval.code_scale`, `eval.context_weight` and `eval.samples`. Their defaults are the
papers': the codes of one token sequence, decoded as they are.

B batch, L code length, d code channels, V vocabulary, S image side, C classes or channels of a label map.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from uvim_fsq.config.schema import EvalConfig
from uvim_fsq.data.loader import derive_seed
from uvim_fsq.errors import UserError
from uvim_fsq.lm.base import Generated, Generator, SampleGenerator, TokenModel
from uvim_fsq.lm.sampling import Sampling
from uvim_fsq.oracle.label_decoder import LabelDecoder
from uvim_fsq.oracle.model import Oracle
from uvim_fsq.oracle.quantizers.base import Quantizer
from uvim_fsq.tasks.base import Categorical, LabelChannel, Task

#: Label channel -> (B, S, S, C) float32.
Logits = dict[str, torch.Tensor]


def build_generator(lm: TokenModel, config: EvalConfig) -> Generator:
    """Builds the LM's generator from the `eval` settings. Raises UserError if the token model does not support them."""
    return lm.generator(
        Sampling.of(config),
        precision=config.precision,
        int8_cross_kv=config.int8_cross_kv,
        compile=config.compile,
        probabilities=config.codes == "soft",
    )


def image_seeds(seed: int, indices: torch.Tensor) -> torch.Tensor:
    """(B,) int64 seeds of images, from `eval.seed` and the images' indices (B,) in the split."""
    return seed * 1_000_003 + indices.cpu()


def sample_seeds(seeds: torch.Tensor, number: int) -> torch.Tensor:
    """(B,) int64 seeds of the images' sample `number`. Sample 0 has the images' own `seeds` (B,)."""
    if number == 0:
        return seeds
    return torch.tensor([derive_seed(seed, seed >> 32, number) for seed in seeds.tolist()], dtype=torch.int64)


def chosen_codes(quantizer: Quantizer, generated: Generated, kind: str) -> torch.Tensor:
    """The codes (B, L, d) float32 of generated tokens.

    Args:
        quantizer: the oracle's.
        generated: with probabilities if `kind` is "soft".
        kind: "hard", the codes of the tokens, or "soft", the mean code under the LM's distribution of each token. This
            is the distribution given the tokens before, as the LM states it: temperature, top-k and top-p choose the
            tokens but do not change it.
    """
    if kind == "hard":
        return quantizer.indices_to_codes(generated.tokens)
    return quantizer.expected_codes(distributions(generated))


def distributions(generated: Generated) -> torch.Tensor:
    """The probabilities (B, L, V) of generated tokens. Raises UserError for a token model that returned none."""
    if generated.probabilities is None:
        raise UserError(
            "eval.codes=soft: the token model returned no probabilities, which its `generate` must do if asked for "
            "them; set eval.codes=hard, or mend the plugin"
        )
    return generated.probabilities


def scale_codes(decoder: LabelDecoder, codes: torch.Tensor, scale: float) -> torch.Tensor:
    """Codes on the line from the decoder's empty codes (`scale` 0) to the given ones (`scale` 1), (B, L, d)."""
    if scale == 1:
        return codes
    empty = decoder.empty_codes(codes.shape[0])  # not `len`, which would fix it in a graph for any batch
    return empty + scale * (decoder.mark_present(codes) - empty)


class LogitMean:
    """The weighted running mean of several decoder outputs.

    A categorical channel is averaged by probability, a real one by value.

    Args:
        channels: the task's label channels.
    """

    def __init__(self, channels: Mapping[str, LabelChannel]) -> None:
        self.channels = channels
        self._weight = 0.0
        self._sums: Logits = {}

    def add(self, logits: Mapping[str, torch.Tensor], weight: float = 1.0) -> None:
        """Adds an output, channel -> (B, S, S, C) logits or values, with a weight above 0."""
        for name, channel in self.channels.items():
            if isinstance(channel, Categorical):
                # In logarithms: a probability that float32 rounds to 0 would have the logarithm -inf, and a task may
                # sum over pixels.
                term = logits[name].log_softmax(-1) + math.log(weight)
                self._sums[name] = torch.logaddexp(self._sums[name], term) if name in self._sums else term
            else:
                term = logits[name] * weight
                self._sums[name] = self._sums[name] + term if name in self._sums else term
        self._weight += weight

    def logits(self) -> Logits:
        """The mean so far, as `Task.decode` takes it: log-probabilities of categorical channels, values of real ones.

        Needs at least one output.
        """
        return {
            name: self._sums[name] - math.log(self._weight)
            if isinstance(channel, Categorical)
            else self._sums[name] / self._weight
            for name, channel in self.channels.items()
        }


class Part(NamedTuple):
    """Codes that `iter_mixed_logits` decodes, and how much they count.

    Attributes:
        weight: above 0.
        decoder: decodes the codes to logits.
        codes: (B, L, d).
        features: (B, M, E), the token model's image features, for a decoder that sees them.
    """

    weight: float
    decoder: LabelDecoder
    codes: torch.Tensor
    features: torch.Tensor | None = None


def decode_part(part: Part, image: torch.Tensor, rows: slice) -> Logits:
    """The logits of a part for some of the images (B, 3, S, S)."""
    features = None if part.features is None else part.features[rows]
    return part.decoder.decode(part.codes[rows], image[rows], features)


def iter_mixed_logits(
    channels: Mapping[str, LabelChannel], parts: Sequence[Part], image: torch.Tensor
) -> Iterator[Logits]:
    """Decodes several codes per image and averages them. Yields a few images at a time, like `iter_logits`.

    Args:
        channels: the task's label channels.
        parts: at least one. A single part is decoded as it is.
        image: (B, 3, S, S).
    """
    if len(parts) == 1:
        _, decoder, codes, features = parts[0]
        yield from decoder.iter_logits(codes, image, features)
        return
    for rows in parts[0].decoder.image_chunks(len(image)):
        yield _mixed_rows(channels, parts, image, rows)


def mixed_logits(channels: Mapping[str, LabelChannel], parts: Sequence[Part], image: torch.Tensor) -> Logits:
    """What `iter_mixed_logits` yields, for all images at once, however many logits that are.

    It does not look at the number of images, so that it can be part of a graph for any batch.
    """
    if len(parts) == 1:
        _, decoder, codes, features = parts[0]
        return decoder.decode(codes, image, features)
    return _mixed_rows(channels, parts, image, slice(None))


def _mixed_rows(
    channels: Mapping[str, LabelChannel], parts: Sequence[Part], image: torch.Tensor, rows: slice
) -> Logits:
    """The mean over the parts for some of the images."""
    mean = LogitMean(channels)
    for part in parts:
        mean.add(decode_part(part, image, rows), part.weight)
    return mean.logits()


class LMDecoder:
    """Predicts label maps from images through a token model and its oracle, according to the `eval` settings.

    Codes are decoded by the oracle or, with `model.decoder: trained`, by the token model's copy of its decoder. What
    `eval.context_weight` mixes in is always the oracle's prediction without codes.

    Args:
        lm: the token model, in evaluation mode.
        oracle: its oracle.
        task: the task, which decodes logits to predictions.
        config: how tokens are chosen and decoded.

    Raises UserError for settings that the token model does not support.
    """

    def __init__(self, lm: TokenModel, oracle: Oracle, task: Task, config: EvalConfig) -> None:
        self.oracle, self.task, self.config, self.kind = oracle, task, config, lm.config.kind
        self.decoder = lm.label_decoder or oracle
        self.generator = build_generator(lm, config)

    def __call__(self, image: torch.Tensor, seeds: torch.Tensor) -> tuple[list[Any], torch.Tensor]:
        """Predicts a batch. The prediction of an image does not depend on the others.

        Args:
            image: (B, 3, S, S), uint8 or floating point in [-1, 1].
            seeds: (B,) int64, one random stream per image.

        Returns one prediction per image, as `Task.decode` does, and the tokens (B, L) int64 of the first sample.
        """
        parts, tokens = self.parts(image, seeds)
        return self.decode(parts, image), tokens

    def samples(self, image: torch.Tensor, seeds: torch.Tensor) -> tuple[list[Any], torch.Tensor]:
        """Predicts one image several times; with a generator that can, it is encoded once.

        Args:
            image: (1, 3, S, S), as for a batch.
            seeds: (K,) int64, one random stream per sample.

        Returns K predictions and their tokens (K, L), as for a batch of K equal images. `eval.samples` must be 1.
        """
        count = len(seeds)
        images = image.expand(count, -1, -1, -1)
        if isinstance(self.generator, SampleGenerator):
            generated = self.generator.samples(image, seeds, count)
        else:
            generated = self.generator(images.contiguous(), seeds)
        parts, tokens = self.parts_of([generated], count)
        return self.decode(parts, images), tokens

    def parts(self, image: torch.Tensor, seeds: torch.Tensor) -> tuple[list[Part], torch.Tensor]:
        """What a batch is decoded from, one part for each sample and one for the context, and the first's tokens."""
        samples = (self.generate(image, seeds, number) for number in range(self.config.samples))
        return self.parts_of(samples, image.shape[0])

    def parts_of(self, samples: Iterable[Generated], count: int) -> tuple[list[Part], torch.Tensor]:
        """What `parts` returns, given all samples of `count` images."""
        config = self.config
        parts: list[Part] = []
        tokens: list[torch.Tensor] = []
        for generated in samples:
            weight = (1 - config.context_weight) / config.samples
            parts.append(self.code_part(generated, config.codes, config.code_scale, weight))
            tokens = tokens or [generated.tokens]
        parts.append(self.context_part(count, config.context_weight))
        return [part for part in parts if part.weight > 0], tokens[0]

    def decode(self, parts: Sequence[Part], image: torch.Tensor) -> list[Any]:
        """One prediction per image, as `Task.decode` returns it, from what `parts` returned for these images."""
        logits = iter_mixed_logits(self.task.label_channels, parts, image)
        return [item for chunk in logits for item in self.task.decode(chunk)]

    def generate(self, image: torch.Tensor, seeds: torch.Tensor, number: int) -> Generated:
        """Sample `number` of each image (B, 3, S, S); `seeds` (B,) int64 are the images' own."""
        return self.generator(image, sample_seeds(seeds, number))

    def code_part(self, generated: Generated, codes: str, scale: float, weight: float = 1.0) -> Part:
        """What the decoder gets for generated tokens, according to `eval.codes` and `eval.code_scale`."""
        given = scale_codes(self.oracle, chosen_codes(self.oracle.quantizer, generated, codes), scale)
        features = generated.features if self.decoder.feature_projection is not None else None
        return Part(weight, self.decoder, given, features)

    def context_part(self, count: int, weight: float = 1.0) -> Part:
        """What the oracle's decoder gets for context alone, for `count` images."""
        return Part(weight, self.oracle, self.oracle.empty_codes(count))
