"""What the page shows of a photo: the prediction, its tokens, and several samples with their spread.

H, W height and width of the photo; L code length, n = sqrt(L) side of the token map; K samples.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from uvim_fsq.checkpoints.loading import LoadedDirect, LoadedRun
from uvim_fsq.config.schema import EvalConfig
from uvim_fsq.data.images import limit_pixels, read_image
from uvim_fsq.data.sample import Array
from uvim_fsq.errors import UserError, enough_memory
from uvim_fsq.experiments.code_pictures import code_colors
from uvim_fsq.inference.predictor import Predictor
from uvim_fsq.oracle.quantizers.base import Quantizer
from uvim_fsq.tasks.legend import color, draw_scale

#: The largest photo in pixels, unless `data.max_pixels` is given: one of 24 megapixels.
MAX_PIXELS = 25_000_000
#: The most samples, and the most pixels of all samples of a photo together.
MAX_SAMPLES, MAX_SAMPLED = 16, 64_000_000
#: Side of a token map in pixels: its cells get as large as fit.
MAP_SIDE = 384
#: Codebooks up to this size get colors.
MAX_COLORED = 1 << 20


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen and decoded, by the names of the keys under `eval`, and how many samples are shown.

    Attributes:
        codes: "hard" or "soft".
        temperature: 0 is greedy.
        steps: None for a model that does not decode in steps.
        choice_temperature: as `steps`.
        seed: of the random numbers.
        samples: K; above 1 the predictions are shown side by side, while `eval.samples` would average them.
    """

    codes: str = "hard"
    temperature: float = 0.0
    steps: int | None = None
    choice_temperature: float | None = None
    seed: int = 0
    samples: int = 1

    def overrides(self) -> list[str]:
        """The settings as `key=value` strings."""
        values = {"codes": self.codes, "temperature": self.temperature, "seed": self.seed}
        if self.steps is not None:
            values["steps"] = self.steps
        if self.choice_temperature is not None:
            values["choice_temperature"] = self.choice_temperature
        return [f"eval.{key}={value}" for key, value in values.items()]


@dataclass(frozen=True)
class View:
    """What is shown. All pictures are (height, width, 3) uint8.

    Attributes:
        prediction: (H, W, 3).
        legend: explains the colors of `prediction`; None if there is nothing to explain.
        tokens: the token map, a square for each token; None without tokens.
        samples: K pictures (H, W, 3) in colors that mean the same in all; empty for a single prediction.
        spread: (H, W, 3), how much the samples differ; None if they are equal, for a single prediction, and without
            such a measure.
        spread_legend: the scale of `spread`.
        text: a few words about the prediction.
    """

    prediction: Array
    legend: Array | None = None
    tokens: Array | None = None
    samples: list[Array] = field(default_factory=list[Array])
    spread: Array | None = None
    spread_legend: Array | None = None
    text: str = ""


class PhotoDemo:
    """Predicts photos with a loaded LM or direct model, one at a time, for any number of threads.

    Args:
        loaded: the checkpoint.
        device: where its models are.
        overrides: the `key=value` strings that it was loaded with.
    """

    def __init__(self, loaded: LoadedRun | LoadedDirect, device: torch.device, overrides: Sequence[str]) -> None:
        self._lock = threading.Lock()
        self._overrides = list(overrides)
        self._base = self._predictor = Predictor(loaded, device)
        self._applied: Decoding | None = None
        self.painter = TokenColors(loaded.oracle.quantizer) if isinstance(loaded, LoadedRun) else None
        self.length = loaded.oracle.code_length if isinstance(loaded, LoadedRun) else 0
        #: Whether the model decodes in steps.
        self.has_steps = isinstance(loaded, LoadedRun) and loaded.lm is not None and loaded.lm.has_steps

    @property
    def decoding(self) -> Decoding | None:
        """The settings that the run was loaded with; None for a direct model, which has none."""
        config = self._base.run.eval
        if not isinstance(config, EvalConfig):
            return None
        steps = (config.steps or 1, config.choice_temperature) if self.has_steps else (None, None)
        return Decoding(config.codes, config.temperature, *steps, config.seed)

    def predict(self, photo: bytes, decoding: Decoding | None = None) -> View:
        """Predicts a photo.

        Args:
            photo: the content of its file.
            decoding: None for the settings that the run was loaded with.

        Raises UserError for a file that is no picture or too large, and for settings that the run does not support, as
        `uvim-fsq predict` does.
        """
        with self._lock, enough_memory("take a smaller picture or fewer samples"):
            predictor = self._with(decoding)
            limit_pixels(predictor.run.data.max_pixels)
            image = read_image(photo)
            count = decoding.samples if decoding is not None else 1
            _check_samples(count, image)
            start = time.perf_counter()
            if count == 1:
                item, tokens = predictor.predict_with_tokens(image)
                return self._view(image, item, tokens, time.perf_counter() - start)
            samples = predictor.predict_samples(image, count)
            view = self._view(image, samples.predictions[0], samples.tokens[0], time.perf_counter() - start)
            return self._with_samples(view, image, samples.predictions, samples.spread)

    def _with(self, decoding: Decoding | None) -> Predictor:
        """The predictor with these settings; only the latest is kept, because each may hold buffers on the device."""
        if decoding != self._applied:
            overrides = [] if decoding is None else decoding.overrides()
            changed = self._base.with_overrides([*self._overrides, *overrides])
            self._predictor, self._applied = changed, decoding
        return self._predictor

    def _view(self, image: Array, item: Any, tokens: Array | None, seconds: float) -> View:
        task = self._predictor.task
        shown = None if tokens is None or self.painter is None else self.painter.draw(tokens)
        text = f"{image.shape[1]} x {image.shape[0]} pixels, {seconds:.2f} s"
        if tokens is not None:
            text += f", {len(tokens)} tokens, {len(np.unique(tokens))} of them different"
        return View(task.render(image, item)["prediction"], task.prediction_legend(item), shown, text=text)

    def _with_samples(self, view: View, image: Array, items: Sequence[Any], spread: Array | None) -> View:
        task = self._predictor.task
        pictures = [task.film_frame(image, item) for item in items]
        if spread is None:
            return replace(view, samples=pictures)
        if not spread.any():
            return replace(view, samples=pictures, text=f"{view.text}; all samples are equal")
        drawn, scale = draw_spread(spread)
        return replace(view, samples=pictures, spread=drawn, spread_legend=scale)


def _check_samples(count: int, image: Array) -> None:
    """Raises UserError for too many samples."""
    if not 1 <= count <= MAX_SAMPLES:
        raise UserError(f"{count} samples: this page shows 1 to {MAX_SAMPLES}")
    pixels = image.shape[0] * image.shape[1]
    if count > 1 and count * pixels > MAX_SAMPLED:
        raise UserError(
            f"{count} samples of {pixels / 1e6:.1f} million pixels are more than this page shows; take at most "
            f"{max(1, MAX_SAMPLED // pixels)}, or a smaller picture"
        )


def draw_spread(spread: Array) -> tuple[Array, Array]:
    """A spread (H, W) float32, not all 0, in colors from 0 to its largest value, and the scale of these colors."""
    high = float(spread.max())
    return color(spread, high, "inferno"), draw_scale(high, name="inferno")


class TokenColors:
    """Draws token maps. Similar codes have similar colors, the same in all pictures of a run.

    Args:
        quantizer: the oracle's.
    """

    def __init__(self, quantizer: Quantizer) -> None:
        self._colors: Array | None = None
        if quantizer.codebook_size <= MAX_COLORED:
            self._colors = code_colors(quantizer, np.ones(quantizer.codebook_size))

    def draw(self, tokens: Array, marked: Sequence[int] = ()) -> Array | None:
        """Tokens (L,) as n x n squares, row by row; None for a codebook that is too large for colors.

        `marked` are indices of tokens whose squares get a white frame with a black line inside.
        """
        if self._colors is None:
            return None
        side = math.isqrt(len(tokens))
        cell = cell_side(len(tokens))
        picture = self._colors[tokens].reshape(side, side, 3).repeat(cell, 0).repeat(cell, 1)
        for index in marked:
            top, left = index // side * cell, index % side * cell
            square = picture[top : top + cell, left : left + cell]
            line = max(1, cell // 16)
            inner = square[2 * line : -2 * line, 2 * line : -2 * line].copy()
            square[:] = 255
            square[line:-line, line:-line] = 0
            square[2 * line : -2 * line, 2 * line : -2 * line] = inner
        return picture


def cell_side(length: int) -> int:
    """The side in pixels of a token's square in a map of L tokens."""
    return max(6, MAP_SIDE // math.isqrt(length))


def token_at(x: float, y: float, length: int) -> int | None:
    """The index of the token at a pixel of its map; None beside the map."""
    side, cell = math.isqrt(length), cell_side(length)
    column, row = int(x // cell), int(y // cell)
    return row * side + column if 0 <= column < side and 0 <= row < side else None
