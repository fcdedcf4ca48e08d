"""Pictures of an oracle's codes: swapped, stitched, repeated, randomly drawn (FSQ, arXiv 2309.15505, figures 8 and 9).

Uses only the `Task` interface. B batch, L code length, n = sqrt(L) side of the token map, d code channels, K codebook
size, N evaluated images.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure

from uvim_fsq.checkpoints.loading import LoadedRun
from uvim_fsq.data.batch import to_device
from uvim_fsq.inference.predictions import lm_predictions
from uvim_fsq.oracle.model import Oracle
from uvim_fsq.oracle.quantizers.base import Quantizer
from uvim_fsq.reports.figures import usage_figure
from uvim_fsq.reports.panels import as_picture, chosen_samples, tile

#: Images per picture, and the largest numbers of code channels, repeated codes and random draws shown.
IMAGES, CHANNELS, SHARED, DRAWS = 5, 8, 6, 3


def sees_image(oracle: Oracle) -> bool:
    """Whether the oracle's decoder gets the image as context."""
    return oracle.config.context in ("both", "decoder")


def stitch(upper: np.ndarray, lower: np.ndarray) -> np.ndarray:
    """Token maps (L,), (L,) -> (L,): the upper n // 2 rows of the first, the other rows of the second."""
    n = math.isqrt(len(upper))
    return np.concatenate([upper[: n // 2 * n], lower[n // 2 * n :]])


def sample_marginals(tokens: np.ndarray, count: int, rng: np.random.Generator, *, own_position: bool) -> np.ndarray:
    """Draws (count, L) independent tokens from the marginals of `tokens` (N, L), of all positions or of each one."""
    images, length = tokens.shape
    rows = rng.integers(images, size=(count, length))
    columns = np.arange(length) if own_position else rng.integers(length, size=(count, length))
    return tokens[rows, columns]


def code_colors(quantizer: Quantizer, counts: np.ndarray) -> np.ndarray:
    """(K,) counts -> (K, 3) uint8: three principal components as RGB, so that similar codes look similar."""
    codes = quantizer.codebook().detach().cpu().double().numpy()
    weights = counts / counts.sum()
    codes = codes - weights @ codes
    axes = np.linalg.eigh((codes.T * weights) @ codes)[1][:, ::-1][:, :3]
    # The sign of an axis is arbitrary; fix it.
    axes = axes * np.sign(axes[np.abs(axes).argmax(0), np.arange(axes.shape[1])])
    shades = codes @ axes
    low, high = shades[counts > 0].min(0), shades[counts > 0].max(0)
    colors = np.full((len(codes), 3), 128, np.uint8)
    colors[:, : shades.shape[1]] = ((shades - low) / np.maximum(high - low, 1e-9) * 255).clip(0, 255)
    return colors


@dataclass
class Picture:
    """A picture of the report, (H, W, 3) uint8 or a figure, with heading and caption; its file is `name`.png."""

    name: str
    heading: str
    caption: str
    picture: np.ndarray | Figure


class Painter:
    """Decodes codes into pictures, drawn over the photo, or over plain gray if the decoder does not see the photo.

    Args:
        loaded: the checkpoint.
        device: where its models are.
        indices: of the images in the evaluation split, or how many evenly spaced ones.

    Attributes:
        tokens: (B, L) int64, the oracle's tokens of the images that are shown.
        lm_tokens: (B, L) int64, the LM's tokens, or None without an LM.
        lm_items: the LM's predictions (items of `Task.decode`), which `eval.codes` and the keys after it make of them.
    """

    @torch.inference_mode()
    def __init__(self, loaded: LoadedRun, device: torch.device, indices: Sequence[int] | int = IMAGES) -> None:
        self.loaded, self.task, self.oracle = loaded, loaded.task, loaded.oracle
        batch, self.samples = chosen_samples(loaded.task, loaded.run.data, indices)
        self.batch = to_device(batch, device)
        self.tokens = self.oracle.tokenize(self.batch["labels"], self.batch["image"]).cpu().numpy()
        self.lm_tokens: np.ndarray | None = None
        self.lm_items: list[Any] = []
        if loaded.lm is not None:
            predicted = lm_predictions(loaded.lm, self.oracle, self.task, loaded.run.eval)(self.batch)
            assert predicted.tokens is not None
            self.lm_tokens, self.lm_items = predicted.tokens.cpu().numpy(), predicted.items

    @torch.inference_mode()
    def predicted(self, tokens: np.ndarray | None, row: int) -> Any:
        """The prediction (an item of `Task.decode`) of tokens (L,), or of dropped codes for None, for image `row`."""
        image = self.batch["image"][row : row + 1]
        codes = self.oracle.empty_codes(1)
        if tokens is not None:
            codes = self.oracle.quantizer.indices_to_codes(torch.from_numpy(tokens)[None].to(image.device))
        return self.task.decode(self.oracle.decode(codes, image))[0]

    def decoded(self, tokens: np.ndarray | None, row: int) -> np.ndarray:
        """The picture of `predicted`."""
        return self.drawn(self.predicted(tokens, row), row)

    def drawn(self, item: Any, row: int) -> np.ndarray:
        """The picture of a prediction for image `row`, on the scale of the image's ground truth."""
        sample = self.samples[row]
        canvas = sample.image if sees_image(self.oracle) else np.full_like(sample.image, 128)
        return self.task.render(canvas, self.task.to_size(item, canvas), sample)["prediction"]

    def truth(self, row: int) -> np.ndarray | None:
        # Always over the photo: in colorization the photo is the ground truth.
        sample = self.samples[row]
        item = self.task.to_size(self.predicted(self.tokens[row], row), sample.image)
        return self.task.render(sample.image, item, sample).get("ground truth")

    def photo(self, row: int) -> np.ndarray:
        return as_picture(self.task.model_image(self.samples[row]))

    def swaps(self) -> np.ndarray:
        """One row per image: its own codes, another image's, zero codes, and the LM's if there is one."""
        rows, zero = [], "context alone" if sees_image(self.oracle) else "zero codes"
        for i, tokens in enumerate(self.tokens):
            row = {"image": self.photo(i), "ground truth": self.truth(i), "own codes": self.decoded(tokens, i)}
            row |= {"codes of next row": self.decoded(np.roll(self.tokens, -1, 0)[i], i), zero: self.decoded(None, i)}
            if self.lm_tokens is not None:
                row["LM's codes"] = self.drawn(self.lm_items[i], i)
            rows.append({title: picture for title, picture in row.items() if picture is not None})
        return tile(rows)

    def maps(self, counts: np.ndarray) -> np.ndarray:
        """Token maps in the colors of `code_colors`, for FSQ also the levels of each channel from dark to light."""
        quantizer, n = self.oracle.quantizer, math.isqrt(self.oracle.code_length)
        colors, rows = code_colors(quantizer, counts), []
        for i, tokens in enumerate(self.tokens):
            row = {
                "image": self.photo(i),
                "own codes": self.decoded(tokens, i),
                "tokens": colors[tokens].reshape(n, n, 3),
            }
            if self.lm_tokens is not None:
                row["LM's tokens"] = colors[self.lm_tokens[i]].reshape(n, n, 3)
            if quantizer.levels:
                digits = quantizer.indices_to_digits(torch.from_numpy(tokens).to(quantizer.device)).cpu().numpy()
                for c, level in enumerate(quantizer.levels[:CHANNELS]):
                    shades = matplotlib.colormaps["viridis"](digits[:, c] / (level - 1))[:, :3] * 255
                    row[f"channel {c}: {level} levels"] = shades.astype(np.uint8).reshape(n, n, 3)
            rows.append(row)
        return tile(rows)

    def stitched(self) -> np.ndarray:
        """The codes of each image (A) stitched to those of a distant one (B); neighbors may be frames of one video."""
        rows, count = [], len(self.tokens)
        for a, b in ((i, (i + (count + 1) // 2) % count) for i in range(count)):
            tokens = stitch(self.tokens[a], self.tokens[b])
            row = {"image A": self.photo(a), "image B": self.photo(b)}
            row |= {"A's codes": self.decoded(self.tokens[a], a), "B's codes": self.decoded(self.tokens[b], b)}
            row["A over B, sees A" if sees_image(self.oracle) else "A over B"] = self.decoded(tokens, a)
            if sees_image(self.oracle):
                row["A over B, sees B"] = self.decoded(tokens, b)
            rows.append(row)
        return tile(rows)

    def given(self, columns: Mapping[str, np.ndarray]) -> np.ndarray:
        """The same tokens (L,) for every image. Without context the image does not matter, so there is one row."""
        if not sees_image(self.oracle):
            return tile([{title: self.decoded(tokens, 0) for title, tokens in columns.items()}])
        return tile(
            [
                {"image": self.photo(i), **{title: self.decoded(tokens, i) for title, tokens in columns.items()}}
                for i in range(len(self.samples))
            ]
        )


def draw(loaded: LoadedRun, result: Mapping[str, Any], tokens: np.ndarray, device: torch.device) -> list[Picture]:
    """All pictures of the report. `tokens` (N, L) are the oracle's tokens of the evaluated images."""
    painter, counts = Painter(loaded, device), np.array(result["code_counts"]["oracle"])
    length, rng = loaded.oracle.code_length, np.random.default_rng(result["seed"])
    top = [int(code) for code in np.argsort(-counts, kind="stable")[:SHARED] if counts[code]]
    shared = {f"code {code}: {counts[code] / counts.sum():.1%}": np.full(length, code) for code in top}
    draws: dict[str, np.ndarray] = {}
    for title, own_position in (("any position", False), ("own position", True)):
        drawn = sample_marginals(tokens, DRAWS, rng, own_position=own_position)
        draws |= {f"{title}, draw {k + 1}": row for k, row in enumerate(drawn)}
    swapped = "Each image decoded from its own codes, from those of the image in the next row, and from zero codes."
    channels = "Nearby codes have similar colors. Colors cannot be compared between runs."
    if loaded.oracle.quantizer.levels:
        channels += f" FSQ channels (at most {CHANNELS}): dark blue is the lowest level, yellow the highest."
    context = ", decoded with A's or B's image" if sees_image(loaded.oracle) else ""
    halves = f"Upper token rows of A and lower ones of B{context}."
    one = "The most frequent codes, each at every position, with their share of all tokens."
    chance = "Each position drawn independently from the token counts of all positions, or of that position."
    pictures = [Picture("swapped_codes", "Own, swapped and zero codes", swapped, painter.swaps())]
    for name in ("oracle", "lm"):
        if name in result["code_counts"]:
            figure = usage_figure(result["code_counts"][name], result["level_histogram"][name])
            whose = "the oracle" if name == "oracle" else "the language model"
            note = f"Over {int(result['figures'][name]['tokens_counted'])} tokens of {result['images']} images."
            pictures.append(Picture(f"usage_{name}", f"Codes used by {whose}", note, figure))
    return [
        *pictures,
        Picture("token_maps", "Token maps", channels, painter.maps(counts)),
        Picture("stitched", "Stitched codes", halves, painter.stitched()),
        Picture("shared_codes", "One code at every position", one, painter.given(shared)),
        Picture("marginals", "Codes drawn from their marginals", chance, painter.given(draws)),
    ]
