"""The whole prediction of a batch as one function of tensors, so that it can be compiled as one graph.

It is made of the same parts as the plain path: the token generator, `LMDecoder`, the label decoder.

B batch, S image side, L code length, C classes or channels of a label map.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from uvim_fsq.config.schema import BasicEvalConfig
from uvim_fsq.direct.model import DirectModel
from uvim_fsq.errors import UserError
from uvim_fsq.inference.code_decoding import LMDecoder, Logits, mixed_logits, sample_seeds
from uvim_fsq.lm.base import Generated, PureGenerator
from uvim_fsq.lm.token_generator import TokenGenerator
from uvim_fsq.oracle.chunking import fits_one_chunk
from uvim_fsq.tasks.base import Task

#: The name of the tokens among the outputs of a `MapGraph`.
TOKENS = "tokens"


#: Up to this many tokens x decoder blocks, the steps of an autoregressive model are compiled one after the other. That
#: runs a sixth faster than a compiled loop, but each of them takes the compiler two seconds.
MAX_UNROLLED = 64


def needs_loop(generator: PureGenerator) -> bool:
    """Whether to compile an autoregressive model as a loop, because compiling its unrolled steps would take long."""
    if not isinstance(generator, TokenGenerator):
        return False
    return generator.model.length * len(generator.model.blocks) > MAX_UNROLLED


class PredictionGraph(nn.Module):
    """Images to label logits. Subclasses say how."""

    def __init__(self, config: BasicEvalConfig, pixel_logits: int, image_size: int) -> None:
        super().__init__()
        self.config, self.image_logits = config, pixel_logits * image_size**2
        #: (3, S, S)
        self.image_shape = (3, image_size, image_size)

    @property
    def has_loop(self) -> bool:
        """Whether a compiled package of it holds a loop; see `needs_loop`."""
        return False

    def draw(self, seeds: torch.Tensor) -> torch.Tensor | None:
        """The random numbers that images with seeds (B,) int64 need, the input `drawn`; None if nothing is random."""
        return None

    def predict(self, image: torch.Tensor, drawn: torch.Tensor | None) -> tuple[Logits, torch.Tensor | None]:
        """Label channel -> logits (B, S, S, C) float32, and the tokens (B, L) int64 of the first sample, if any."""
        raise NotImplementedError

    def forward(self, image: torch.Tensor, drawn: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        """The logits of the label channels in order, then the tokens if there are any.

        Args:
            image: (B, 3, S, S), uint8 or floating point in [-1, 1].
            drawn: from `draw`.
        """
        # No cache of casts: it would hold the tensors of another trace.
        bf16 = self.config.precision == "bf16"
        with torch.autocast(image.device.type, torch.bfloat16, enabled=bf16, cache_enabled=False):
            logits, tokens = self.predict(image, drawn)
        return (*logits.values(), *(() if tokens is None else (tokens,)))

    def fits(self, batch: int) -> bool:
        """Whether the plain path computes the logits of a batch at once, not in several parts to save memory."""
        return fits_one_chunk(batch, self.image_logits)

    def check_batch(self, batch: int) -> None:
        """Raises UserError for a batch that does not fit."""
        if not self.fits(batch):
            raise UserError(f"--batch {batch}: the label maps of so many images are too large at once; give less")


class LMGraph(PredictionGraph):
    """The prediction of a token model and its oracle.

    Args:
        decode: the plain path, on a model that generates greedily or at random, in one step or many.

    Raises UserError for a token model whose generator is not a `PureGenerator`.
    """

    def __init__(self, decode: LMDecoder) -> None:
        head = decode.decoder.label_head
        super().__init__(decode.config, head.logits // head.pixels, decode.oracle.image_size)
        if not isinstance(decode.generator, PureGenerator):
            raise UserError(
                f"token model {decode.kind} cannot be compiled whole: its generator has no `draw` and `predict`"
            )
        self.generator = decode.generator
        self.decode = decode

    @property
    def has_loop(self) -> bool:
        return needs_loop(self.generator)

    def draw(self, seeds: torch.Tensor) -> torch.Tensor | None:
        """All samples of all images, the first sample of all images first."""
        numbers = [self.generator.draw(sample_seeds(seeds, sample)) for sample in range(self.decode.config.samples)]
        return torch.cat([n for n in numbers if n is not None]) if numbers[0] is not None else None

    def predict(self, image: torch.Tensor, drawn: torch.Tensor | None) -> tuple[Logits, torch.Tensor | None]:
        count = self.decode.config.samples
        found = self.generator.predict(image, drawn, copies=count)
        batch = image.shape[0]  # not `len`, which would fix it in a graph for any batch
        samples = (_rows(found, slice(number * batch, (number + 1) * batch)) for number in range(count))
        parts, tokens = self.decode.parts_of([found] if count == 1 else samples, batch)
        return mixed_logits(self.decode.task.label_channels, parts, image), tokens


class DirectGraph(PredictionGraph):
    """The prediction of a direct model."""

    def __init__(self, model: DirectModel, config: BasicEvalConfig) -> None:
        head = model.label_head
        super().__init__(config, head.logits // head.pixels, model.image_size)
        self.model = model

    def predict(self, image: torch.Tensor, drawn: torch.Tensor | None) -> tuple[Logits, torch.Tensor | None]:
        return self.model.logits(image), None


class MapGraph(nn.Module):
    """Images to the label maps of the task (`Task.to_maps`), without anything random: what an export holds.

    Args:
        graph: the prediction.
        task: its task.
        models: what the prediction computes with, so that its weights are those of this module.
    """

    def __init__(self, graph: PredictionGraph, task: Task, models: Sequence[nn.Module]) -> None:
        super().__init__()
        self.prediction, self.task, self.models = graph, task, nn.ModuleList(models)

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        """Label maps by name, (B, ...), and for a model with tokens "tokens" (B, L) int64.

        Args:
            image: (B, 3, S, S), uint8 or floating point in [-1, 1].
        """
        channels = self.task.label_channels
        found = self.prediction(image)
        maps = self.task.to_maps(dict(zip(channels, found, strict=False)))
        return {**maps, **dict(zip([TOKENS], found[len(channels) :], strict=False))}


def _rows(generated: Generated, rows: slice) -> Generated:
    def some(x: torch.Tensor | None) -> torch.Tensor | None:
        return None if x is None else x[rows]

    return Generated(generated.tokens[rows], some(generated.probabilities), some(generated.features))
