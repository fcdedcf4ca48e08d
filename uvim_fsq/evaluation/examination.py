"""What a report shows of a prediction besides its metrics: single images, tokens, their confidence, the task's tables.

N images, L code length, V codebook size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from uvim_fsq import processes
from uvim_fsq.data.sample import Array, Batch, Sample, SampleSource
from uvim_fsq.errors import UserError
from uvim_fsq.evaluation.intervals import Stacked
from uvim_fsq.inference.predictions import Predictions
from uvim_fsq.tasks.base import Matrix, Metric, Task

#: Ranges of confidence, as in Guo et al., "On calibration of modern neural networks" (arXiv 1706.04599).
CONFIDENCE_BINS = 15
#: Largest table of counts per position and code, in numbers.
MAX_COUNTS = 1 << 24


@dataclass(frozen=True)
class Calibration:
    """How often an LM's tokens are right, by the probability that the LM gave them.

    A token is right if it equals the oracle's at the same place.

    Attributes:
        tokens, confidence, right: (CONFIDENCE_BINS,) float64, the number of tokens in each range, and the sums of their
            probabilities and of those that are right.
    """

    tokens: Array
    confidence: Array
    right: Array

    @property
    def error(self) -> float:
        """The expected calibration error: the mean difference of confidence and share right, weighted by tokens."""
        return float(np.abs(self.confidence - self.right).sum() / self.tokens.sum())


@dataclass(frozen=True)
class Examined:
    """What was found out about one predict function.

    Attributes:
        values: (image id, index in the split, main metric of this image alone), of the images that have one.
        positions: (L, V) how often each code is used at each place; None without tokens or if it were too large.
        right: (L,) share of images whose token at each place is the oracle's; None without an LM.
        calibration: None if the confidence of tokens is not known.
        tables: see `Breakdown.tables`.
    """

    values: list[tuple[str, int, float]] = field(default_factory=list[tuple[str, int, float]])
    positions: Array | None = None
    right: Array | None = None
    calibration: Calibration | None = None
    tables: dict[str, Matrix] = field(default_factory=dict[str, Matrix])


class Examiner:
    """Accumulates what `Examined` holds over the batches of this process.

    Args:
        task: the task.
        source: the evaluated split.
        codebook_size: V, or 0 for predictions without tokens.
    """

    def __init__(self, task: Task, source: SampleSource, codebook_size: int) -> None:
        self.codebook_size = codebook_size
        self.breakdown = task.breakdown(source)
        self.indices: dict[str, int] = {}
        self.sums: dict[str, Array] = {}

    def add(self, batch: Batch, predicted: Predictions, samples: Sequence[Sample]) -> None:
        """Adds a batch, its predictions and its samples at native size."""
        self.indices |= zip(batch["id"], batch["index"].tolist(), strict=True)
        if self.breakdown is not None:
            for item, sample in zip(predicted.items, samples, strict=True):
                self.breakdown.update(item, sample)
        if predicted.tokens is None or not self.codebook_size:
            return
        tokens = predicted.tokens.cpu().numpy()
        length = tokens.shape[1]
        if length * self.codebook_size <= MAX_COUNTS:
            counts = self.sums.setdefault("positions", np.zeros((length, self.codebook_size)))
            np.add.at(counts, (np.arange(length), tokens), 1)
        if predicted.truth is None:
            return
        right = (predicted.tokens == predicted.truth).double().cpu().numpy()
        self._sum("right", np.stack([right.sum(0), np.full(length, len(right), np.float64)]))
        if predicted.confidence is not None:
            confidence = predicted.confidence.double().cpu().numpy().ravel()
            # The range that contains the right end, so that certainty is in the last one.
            bins = np.clip(np.ceil(confidence * CONFIDENCE_BINS).astype(np.int64) - 1, 0, CONFIDENCE_BINS - 1)
            parts = (np.ones_like(confidence), confidence, right.ravel())
            self._sum("calibration", np.stack([np.bincount(bins, part, CONFIDENCE_BINS) for part in parts]))

    def _sum(self, name: str, value: Array) -> None:
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def finish(
        self, metric: Callable[[], Metric], key: str, rows: Sequence[Mapping[str, Any]], states: Stacked | None
    ) -> Examined:
        """The result over all processes, all of which must call this.

        Args:
            metric: makes an accumulator, if one is needed.
            key: the main metric.
            rows: the metrics of the images of all processes.
            states: what each image added to the metric, if that is known.
        """
        indices: dict[str, int] = {}
        parts: list[dict[str, Array]] = []
        mine = {f"table {name}": x for name, x in self.breakdown.state().items()} if self.breakdown is not None else {}
        for own, sums in processes.gather((self.indices, self.sums | mine)):
            indices |= own
            parts.append(sums)
        # A process without images has no sums of tokens.
        names = dict.fromkeys(name for part in parts for name in part)
        total = {name: np.sum([part[name] for part in parts if name in part], axis=0) for name in names}
        state = {name.removeprefix("table "): x for name, x in total.items() if name.startswith("table ")}
        return Examined(
            [(name, indices[name], value) for name, value in image_values(metric, key, rows, states)],
            total.get("positions"),
            total["right"][0] / total["right"][1] if "right" in total else None,
            Calibration(*total["calibration"]) if "calibration" in total else None,
            self.breakdown.tables(state) if self.breakdown is not None else {},
        )


def image_values(
    metric: Callable[[], Metric], key: str, rows: Sequence[Mapping[str, Any]], states: Stacked | None
) -> list[tuple[str, float]]:
    """The id and the figure of each image that has one: of its row or, if rows lack it, computed from its state.

    Args:
        metric: makes an accumulator that computes the figure from a state.
        key: the name of the figure.
        rows: from `Metric.update`, with the image's `id`.
        states: what each image added to the metric; None if that was not recorded.
    """
    found = [(str(row["id"]), float(row[key])) for row in rows if key in row]
    if not found and states is not None:
        accumulator = metric()
        for i, name in enumerate(states[0]):
            accumulator.load_state({part: x[i] for part, x in states[1].items()})
            try:
                figures = accumulator.compute()
            except UserError:  # an image that does not count
                continue
            if key in figures:
                found.append((name, float(figures[key])))
    return [(name, value) for name, value in found if np.isfinite(value)]
