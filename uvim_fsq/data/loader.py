"""From a SampleSource to batches, deterministic in (seed, epoch, index) whatever the workers, processes or batch size.

The order of the data is our own: Accelerate's resume is known to replay the first epoch's order.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

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

    def __getitem__(self, request: Request) -> Item | str:
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


class Collated(NamedTuple):
    """What a worker hands over: a batch of what could be read (None if nothing could), the views, and every error."""

    batch: Batch | None
    views: list[Sample | None]
    errors: list[str]


def _stack(arrays: Sequence[np.ndarray]) -> torch.Tensor:
    """One tensor of equal arrays; in a worker PyTorch puts it into shared memory at once."""
    # Arrays may be views, mirrored or read-only, which tensors may not; and of types that only NumPy reconciles.
    kind = np.result_type(*arrays)
    return default_collate([torch.from_numpy(np.require(array, kind, ("C", "W"))) for array in arrays])


def collate(items: Sequence[Item | str]) -> Collated:
    """One batch of all that could be read."""
    errors = [item if isinstance(item, str) else item.error for item in items]
    good = [item for item in items if isinstance(item, Item)]
    batch = None
    if good:
        batch = Batch(
            image=_stack([item.image for item in good]),
            labels={name: _stack([item.labels[name] for item in good]) for name in good[0].labels},
            index=torch.tensor([item.index for item in good]),
            id=[item.id for item in good],
        )
    return Collated(batch, [item.view for item in good], [error for error in errors if error])


def keep_freed_memory() -> None:
    """Has this process keep the memory that it frees. For loader processes, which need the same again for each sample.

    By default GNU's C library gives arrays of a photo's size back to the kernel, and to have them mapped anew takes
    as long as all else that happens to a sample.
    """
    mmap_threshold, trim_threshold = -3, -1  # malloc.h
    with contextlib.suppress(OSError, AttributeError, TypeError):  # other C libraries
        library = ctypes.CDLL(None)
        library.mallopt(mmap_threshold, 32 << 20)  # the most that it takes
        library.mallopt(trim_threshold, 1 << 30)


def _start_worker(_number: int) -> None:
    keep_freed_memory()


def _load(dataset: _Samples, batches: Any, workers: int) -> Iterator[Collated]:
    """Raises UserError where shared memory is too small for the workers, as it is in many containers."""
    if workers:
        # What reading pictures needs and takes seconds to import: once, before the workers are forked.
        importlib.import_module("torchvision.io")
    loader: Iterable[Collated] = DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        prefetch_factor=2 if workers else None,
        # Copies to the GPU go on beside its work only from such memory.
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_start_worker,
    )
    try:
        yield from loader
    except RuntimeError as error:
        if "shared memory" not in str(error):
            raise
        raise UserError(
            f"no room in shared memory (/dev/shm) for the batches of {workers} workers; give a container more "
            "(docker run --shm-size=16g or --ipc=host), or lower data.workers, eval.workers or the batch size"
        ) from error


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
        for batch, _, errors in _load(self.dataset, plan, self.data.workers):
            self.bad += errors
            if len(self.bad) > self.data.max_bad_samples or batch is None:
                allowed = self.data.max_bad_samples
                raise UserError(
                    f"{self.bad[-1]} ({len(self.bad)} unreadable training samples, data.max_bad_samples={allowed})"
                )
            yield batch


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
    for batch, views, errors in _load(dataset, batches, workers):
        if errors or batch is None:
            raise UserError(errors[0])
        yield batch, [view for view in views if view is not None]
