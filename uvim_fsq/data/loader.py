"""From a SampleSource to batches, deterministic in (seed, epoch, index) whatever the workers, processes or batch size.

The order of the data is our own: Accelerate's resume is known to replay the first epoch's order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from uvim_fsq.config import DataConfig
from uvim_fsq.data.sample import Batch, Sample, SampleSource
from uvim_fsq.data.transforms import JointTransform
from uvim_fsq.errors import UserError
from uvim_fsq.tasks.base import Task


@dataclass(frozen=True)
class Request:
    """One sample to load: its index, the seed of its augmentation, and the index to take if it cannot be read."""

    index: int
    seed: int
    substitute: int


@dataclass(frozen=True)
class Item:
    """A loaded sample; `error` names the file that had to be replaced, if any."""

    index: int
    id: str
    image: np.ndarray
    labels: dict[str, np.ndarray]
    error: str | None = None
    view: Sample | None = None


def mix(*values: int) -> int:
    """A 32-bit seed from several integers."""
    return int(np.random.SeedSequence([v & 0xFFFFFFFF for v in values]).generate_state(1)[0])


def epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """The permutation of `count` samples in one epoch."""
    return np.random.default_rng([seed, epoch]).permutation(count)


class TrainPlan:
    """Which samples each optimizer step sees: (count // batch) steps per epoch, the epoch's remainder dropped."""

    def __init__(self, count: int, batch: int, seed: int) -> None:
        if batch > count:
            raise UserError(f"train.batch_size={batch} exceeds the {count} training samples; lower it or add data")
        self.count, self.batch, self.seed = count, batch, seed
        self.steps_per_epoch = count // batch
        self._epoch, self._order = -1, np.zeros(0, np.int64)

    def step(self, step: int) -> list[Request]:
        """The global batch of optimizer step `step` (from 0)."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, epoch_order(self.seed, epoch, self.count)
        chosen = self._order[position * self.batch : (position + 1) * self.batch]
        # A sample that cannot be read is replaced by another of the same epoch, always the same one.
        others = np.roll(self._order, -self.count // 2)[position * self.batch : (position + 1) * self.batch]
        return [Request(int(i), mix(self.seed, epoch, int(i)), int(j)) for i, j in zip(chosen, others, strict=True)]


def share(requests: Sequence[Request], micro: int, micros: int, rank: int, world: int) -> list[Request]:
    """The part of a global batch that one process sees in one micro batch; sizes differ by at most one."""
    parts = np.array_split(np.arange(len(requests)), micros * world)
    return [requests[i] for i in parts[micro * world + rank]]


class _MicroBatches:
    """Batch sampler from `start` to `stop`: for each step its micro batches for one process."""

    def __init__(self, plan: TrainPlan, start: int, stop: int, accumulate: int, rank: int, world: int) -> None:
        self.plan, self.start, self.stop = plan, start, stop
        self.accumulate, self.rank, self.world = accumulate, rank, world

    def __iter__(self) -> Iterator[list[Request]]:
        for step in range(self.start, self.stop):
            requests = self.plan.step(step)
            for micro in range(self.accumulate):
                yield share(requests, micro, self.accumulate, self.rank, self.world)

    def __len__(self) -> int:
        return (self.stop - self.start) * self.accumulate


class _Samples(Dataset[Item | str]):
    """Loads, transforms and encodes one request. Errors come back as text: an exception would lose its one line."""

    def __init__(self, source: SampleSource, transform: JointTransform, *, cache: bool, keep_view: bool) -> None:
        self.source, self.transform, self.keep_view = source, transform, keep_view
        self.cache: dict[int, Sample] | None = {} if cache else None

    def _sample(self, index: int) -> Sample:
        if self.cache is None:
            return self.source[index]
        if index not in self.cache:
            self.cache[index] = self.source[index]
        return self.cache[index]

    def __getitem__(self, request: Request) -> Item | str:  # type: ignore[override]
        error = None
        for index in (request.index, request.substitute):
            try:
                sample = self._sample(index)
                image, labels, view = self.transform(sample, request.seed)
            except UserError as problem:
                error = error or str(problem)
                continue
            return Item(index, sample.id, image, labels, error, view if self.keep_view else None)
        return error or "unreadable sample"


def _collate(items: list[Item | str]) -> list[Item | str]:
    return items


def _stack(items: Sequence[Item]) -> Batch:
    names = items[0].labels
    return Batch(
        image=torch.from_numpy(np.stack([item.image for item in items])),
        labels={name: torch.from_numpy(np.stack([item.labels[name] for item in items])) for name in names},
        index=torch.tensor([item.index for item in items]),
        id=[item.id for item in items],
    )


def _loader(dataset: _Samples, batches: Any, workers: int) -> DataLoader[Any]:
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_collate,
        prefetch_factor=4 if workers else None,
    )


class TrainLoader:
    """Micro batches of training from step `start` to `stop`; iterating yields Batches.

    `bad` lists the unreadable samples met so far ("file: why"); more than `data.max_bad_samples` raise UserError.
    """

    def __init__(
        self,
        source: SampleSource,
        task: Task,
        data: DataConfig,
        *,
        batch_size: int,
        seed: int,
        accumulate: int = 1,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.plan = TrainPlan(len(source), batch_size, seed)
        if batch_size < accumulate * world:
            raise UserError(
                f"train.batch_size={batch_size} is smaller than processes x accumulation ({world} x {accumulate})"
            )
        self.data, self.accumulate, self.rank, self.world = data, accumulate, rank, world
        self.dataset = _Samples(source, JointTransform(data, task, train=True), cache=data.cache, keep_view=False)
        self.bad: list[str] = []

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """The micro batches of optimizer steps start..stop-1, `accumulate` per step."""
        plan = _MicroBatches(self.plan, start, stop, self.accumulate, self.rank, self.world)
        for items in _loader(self.dataset, plan, self.data.workers):
            errors = [item if isinstance(item, str) else item.error for item in items]
            self.bad += [error for error in errors if error]
            good = [item for item in items if isinstance(item, Item)]
            if len(self.bad) > self.data.max_bad_samples or not good:
                allowed = self.data.max_bad_samples
                raise UserError(
                    f"{self.bad[-1]} ({len(self.bad)} unreadable training samples, data.max_bad_samples={allowed})"
                )
            yield _stack(good)


def eval_batches(
    source: SampleSource,
    task: Task,
    data: DataConfig,
    *,
    batch_size: int,
    workers: int,
    limit: int | None = None,
    rank: int = 0,
    world: int = 1,
) -> Iterator[tuple[Batch, list[Sample]]]:
    """Every sample (or the first `limit`) once, unpadded, with its evaluation view at native size.

    Process `rank` of `world` sees every world-th sample. Raises UserError for an unreadable sample.
    """
    count = len(source) if limit is None else min(limit, len(source))
    mine = [Request(i, 0, i) for i in range(rank, count, world)]
    batches = [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)]
    dataset = _Samples(source, JointTransform(data, task, train=False), cache=False, keep_view=True)
    workers = min(workers, math.ceil(len(batches) / 2))
    for items in _loader(dataset, batches, workers):
        for item in items:
            if isinstance(item, str) or item.error:
                raise UserError(item if isinstance(item, str) else str(item.error))
        yield _stack(items), [item.view for item in items]
