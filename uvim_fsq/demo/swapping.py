"""Swaps tokens between two labeled images of the data set and decodes them, which shows what each token stands for.

L code length.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from uvim_fsq.checkpoints.loading import LoadedRun
from uvim_fsq.data.sample import Array
from uvim_fsq.demo.prediction import TokenColors
from uvim_fsq.errors import UserError, enough_memory
from uvim_fsq.experiments.code_pictures import Painter
from uvim_fsq.tasks.legend import color, draw_scale

#: Pairs of images that are kept.
KEPT = 4


@dataclass(frozen=True)
class Side:
    """One of the two images. All pictures are (height, width, 3) uint8.

    Attributes:
        name: the image's id in the data set.
        photo: the image.
        truth: its label; None if the task does not draw it.
        own: what the oracle decodes from its own tokens.
        now: what it decodes after the swap.
        change: the difference of the two; None if the task has no measure.
        tokens: the tokens after the swap, those that were swapped with a frame; None for very large codebooks.
    """

    name: str
    photo: Array
    truth: Array | None
    own: Array
    now: Array
    change: Array | None
    tokens: Array | None


@dataclass(frozen=True)
class Swap:
    """Both images after a swap, the scale (height, width, 3) uint8 of their changes, and a few words about it."""

    sides: tuple[Side, Side]
    scale: Array | None
    text: str


class TokenSwap:
    """The oracle's tokens of pairs of images, one request at a time, for any number of threads.

    Args:
        loaded: an oracle's or an LM's checkpoint; of the latter, only the oracle is used.
        device: where its models are.

    Raises UserError if the labeled images of `data.root` and `data.eval_split` cannot be read.
    """

    def __init__(self, loaded: LoadedRun, device: torch.device) -> None:
        data = loaded.run.data
        self._loaded, self._device = replace(loaded, lm=None), device
        #: Number of images to choose from.
        self.count = len(loaded.task.source(data.root, data.eval_split))
        self.split = data.eval_split
        self.length = loaded.oracle.code_length
        self._colors = TokenColors(loaded.oracle.quantizer)
        self._pairs: OrderedDict[tuple[int, int], Painter] = OrderedDict()
        self._lock = threading.Lock()

    def show(self, first: int, second: int, swapped: Iterable[int] = ()) -> Swap:
        """Decodes two images after a swap of some tokens.

        Args:
            first, second: indices of the images in the split.
            swapped: indices of the tokens that the images exchange.

        Raises UserError for an index that does not exist and for a sample that cannot be read.
        """
        for index in (first, second):
            if not 0 <= index < self.count:
                raise UserError(f"image {index}: split {self.split} has images 0 to {self.count - 1}")
        places = sorted(set(swapped))
        if places and not 0 <= places[0] <= places[-1] < self.length:
            raise UserError(f"token {places[-1]}: an image has tokens 0 to {self.length - 1}")
        with self._lock, enough_memory("choose images of a data set with smaller pictures"):
            painter = self._painter(first, second)
            return self._show(painter, places)

    def _painter(self, first: int, second: int) -> Painter:
        if (first, second) not in self._pairs:
            self._pairs[first, second] = Painter(self._loaded, self._device, [first, second])
            if len(self._pairs) > KEPT:
                self._pairs.popitem(last=False)
        self._pairs.move_to_end((first, second))
        return self._pairs[first, second]

    def _show(self, painter: Painter, places: list[int]) -> Swap:
        tokens = painter.tokens.copy()
        tokens[:, places] = painter.tokens[::-1, places]
        task = self._loaded.task
        items, changes = [], []
        for row, sample in enumerate(painter.samples):
            own, now = (painter.predicted(t[row], row) for t in (painter.tokens, tokens))
            items.append((own, now))
            spread = task.spread([task.to_size(item, sample.image) for item in (own, now)])
            # Twice the spread of two values is their difference, and 1 where two classes differ.
            changes.append(None if spread is None else 2 * spread)
        high = max((float(change.max(initial=0)) for change in changes if change is not None), default=0.0)
        sides = []
        for row, sample in enumerate(painter.samples):
            change = changes[row]
            sides.append(
                Side(
                    sample.id,
                    painter.photo(row),
                    painter.truth(row),
                    painter.drawn(items[row][0], row),
                    painter.drawn(items[row][1], row),
                    None if change is None else color(change, max(high, 1e-6), "inferno"),
                    self._colors.draw(tokens[row], places),
                )
            )
        differing = int((painter.tokens[0] != painter.tokens[1])[places].sum())
        text = f"{len(places)} of {self.length} tokens are swapped, {differing} of them differ between the images"
        scale = draw_scale(high, name="inferno") if high > 0 else None
        return Swap((sides[0], sides[1]), scale, text)


def toggle(swapped: Iterable[int], index: int) -> list[int]:
    """The swapped tokens after a click on one: added, or taken back."""
    return sorted(set(swapped) ^ {index})
