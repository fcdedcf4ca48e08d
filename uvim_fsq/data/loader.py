"""Loads batches from a SampleSource. Order and augmentation depend only on (seed, epoch, index), not on the number of
workers or processes.

The order does not come from Accelerate's data loader, because that replays the first epoch's order after a resume.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import math
import signal
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from uvim_fsq.compilation import compiler_unloaded
from uvim_fsq.config.schema import DataConfig
from uvim_fsq.data.decoded import keep_decoded
from uvim_fsq.data.images import limit_pixels
from uvim_fsq.data.pool import signals_blocked
from uvim_fsq.data.sample import Batch, Sample, SampleSource
from uvim_fsq.data.transforms import Encoding, JointTransform
from uvim_fsq.errors import UserError
from uvim_fsq.files import check_folder

#: Seconds to wait for a batch before a loader process counts as stuck.
BATCH_TIMEOUT = 600


@dataclass(frozen=True)
class Request:
    """One sample to load: its index, its augmentation seed, and the index of a substitute if it cannot be read."""

    index: int
    seed: int
    substitute: int


@dataclass(frozen=True)
class Item:
    """A loaded sample at model size.

    Attributes:
        index: position in the source (the substitute's, if the requested sample could not be read).
        id: the sample's id.
        image: (3, S, S), as in `Batch`.
        labels: channel -> (S, S) or (S, S, C), as in `Batch`.
        bad: index -> error message of a sample that could not be read and was replaced by this one.
        view: the evaluation view; None in training.
    """

    index: int
    id: str
    image: np.ndarray
    labels: dict[str, np.ndarray]
    bad: dict[int, str] = field(default_factory=dict)
    view: Sample | None = None


def derive_seed(*values: int) -> int:
    """Derives a 32-bit seed from several integers."""
    return int(np.random.SeedSequence([v & 0xFFFFFFFF for v in values]).generate_state(1)[0])


def epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """(count,) the permutation of the samples in one epoch."""
    return np.random.default_rng([seed, epoch]).permutation(count)


class TrainPlan:
    """The samples of each optimizer step: count // batch steps per epoch; the epoch's incomplete batch is dropped."""

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
        # The substitute is a sample from half an epoch later, so the same one whenever training is repeated.
        substitutes = np.roll(self._order, -self.count // 2)[position * self.batch : (position + 1) * self.batch]
        return [
            Request(int(i), derive_seed(self.seed, epoch, int(i)), int(j))
            for i, j in zip(chosen, substitutes, strict=True)
        ]


def rank_slice(requests: Sequence[Request], micro: int, micros: int, rank: int, world: int) -> list[Request]:
    """The part of a global batch that process `rank` of `world` sees in micro-batch `micro` of `micros`.

    Sizes differ by at most one.
    """
    parts = np.array_split(np.arange(len(requests)), micros * world)
    return [requests[i] for i in parts[micro * world + rank]]


class _MicroBatches:
    """Batch sampler for steps `start` to `stop` - 1: the micro-batches of one process."""

    def __init__(self, plan: TrainPlan, start: int, stop: int, accumulate: int, rank: int, world: int) -> None:
        self.plan, self.start, self.stop = plan, start, stop
        self.accumulate, self.rank, self.world = accumulate, rank, world

    def __iter__(self) -> Iterator[list[Request]]:
        for step in range(self.start, self.stop):
            requests = self.plan.step(step)
            for micro in range(self.accumulate):
                yield rank_slice(requests, micro, self.accumulate, self.rank, self.world)

    def __len__(self) -> int:
        return (self.stop - self.start) * self.accumulate


class _Samples(Dataset[Item | dict[int, str]]):
    """Loads, transforms and encodes one request.

    Returns errors as index -> message instead of raising: an exception would not stay a single line on its way from a
    loader process. If the substitute cannot be read either, the errors are all that is returned.
    """

    def __init__(self, source: SampleSource, task: Encoding, data: DataConfig, *, train: bool) -> None:
        """`train`: augment samples, and cache them by `data.cache` and `data.cache_dir`; otherwise keep each sample's
        evaluation view.
        """
        self.source, self.transform, self.keep_view = source, JointTransform(data, task, train=train), not train
        self.cache: dict[int, Sample] | None = {} if data.cache and train else None
        self.folder = data.cache_dir if train else ""
        self.max_pixels = data.max_pixels

    def _sample(self, index: int) -> Sample:
        if self.cache is not None and index in self.cache:
            return self.cache[index]
        with keep_decoded(self.folder):
            sample = self.source[index]
        if self.cache is not None:
            self.cache[index] = sample
        return sample

    def __getitem__(self, request: Request) -> Item | dict[int, str]:
        bad: dict[int, str] = {}
        limit_pixels(self.max_pixels)  # this may run in a loader process
        for index in (request.index, request.substitute):
            try:
                sample = self._sample(index)
                image, labels, view = self.transform(sample, request.seed)
            except UserError as problem:
                bad[index] = str(problem)
                continue
            except MemoryError:
                bad[index] = f"sample {index} (from 0) is too large for this machine's memory; make its files smaller"
                continue
            return Item(index, sample.id, image, labels, bad, view if self.keep_view else None)
        return bad


class Collated(NamedTuple):
    """What a loader process returns: a batch of the samples that could be read (None if there are none), their
    evaluation views, and index -> error message for those that could not.
    """

    batch: Batch | None
    views: list[Sample | None]
    bad: dict[int, str]


def _stack(arrays: Sequence[np.ndarray]) -> torch.Tensor:
    """Stacks arrays of equal shape into one tensor; in a loader process, directly in shared memory."""
    # torch.from_numpy supports neither negative strides nor read-only arrays; only NumPy promotes mixed dtypes.
    kind = np.result_type(*arrays)
    return default_collate([torch.from_numpy(np.require(array, kind, ("C", "W"))) for array in arrays])


def collate(items: Sequence[Item | dict[int, str]]) -> Collated:
    """Collates all samples that could be read into one batch."""
    bad: dict[int, str] = {}
    for item in items:
        bad |= item.bad if isinstance(item, Item) else item
    good = [item for item in items if isinstance(item, Item)]
    batch = None
    if good:
        batch = Batch(
            image=_stack([item.image for item in good]),
            labels={name: _stack([item.labels[name] for item in good]) for name in good[0].labels},
            index=torch.tensor([item.index for item in good]),
            id=[item.id for item in good],
        )
    return Collated(batch, [item.view for item in good], bad)


def keep_freed_memory() -> None:
    """Makes malloc keep freed memory, for loader processes, which need the same amount again for every sample.

    By default, glibc returns arrays of a photo's size to the kernel. Mapping them again takes as long as all other work
    on a sample.
    """
    mmap_threshold, trim_threshold = -3, -1  # malloc.h
    with contextlib.suppress(OSError, AttributeError, TypeError):  # other C libraries
        library = ctypes.CDLL(None)
        library.mallopt(mmap_threshold, 32 << 20)  # the largest value that it accepts
        library.mallopt(trim_threshold, 1 << 30)


def _start_worker(_number: int) -> None:
    # Signals reach the whole process group (Ctrl-C, `timeout`, systemd, Slurm), but only the parent handles them.
    # PyTorch's workers exit when their parent is gone.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    keep_freed_memory()


@contextlib.contextmanager
def worker_errors() -> Iterator[None]:
    """Converts PyTorch's errors about loader processes into a UserError with the remedy.

    PyTorch raises the death of a loader process wherever the main process happens to be, so this must wrap all code
    that runs while a loader is active.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if "shared memory" in text:
            raise UserError(
                "no room in shared memory (/dev/shm) for the batches of the loader processes; give a container more "
                "(docker run --shm-size=16g or --ipc=host), or lower data.workers, eval.workers or the batch size"
            ) from error
        if "DataLoader timed out" in text:
            raise UserError(
                f"a loader process has not delivered a batch in {BATCH_TIMEOUT} s; check that the disk with the data "
                "is still available, or lower the batch size"
            ) from error
        if "DataLoader worker (pid" in text:
            raise UserError(
                f"a loader process died ({text.splitlines()[0].strip()}), most likely out of memory; "
                "lower data.workers, eval.workers or the batch size"
            ) from error
        raise


def _load(dataset: _Samples, batches: Any, workers: int) -> Generator[Collated, None, None]:
    """Raises UserError if loader processes die, hang, or run out of shared memory."""
    if workers:
        # Needed to read images, and slow to import: do it once, before the workers are forked.
        with compiler_unloaded():
            importlib.import_module("torchvision.io")
    loader = DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        prefetch_factor=2 if workers else None,
        # Only pinned memory can be copied to the GPU asynchronously.
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_start_worker,
        timeout=BATCH_TIMEOUT if workers else 0,
    )
    with worker_errors():
        with signals_blocked():  # until the workers ignore them
            iterator = iter(loader)
        try:
            yield from iterator
        finally:
            if isinstance(iterator, _MultiProcessingDataLoaderIter):
                # This asks the workers to exit, and then sends SIGTERM, which they ignore: kill them afterwards.
                iterator._shutdown_workers()
                for worker in iterator._workers:
                    worker.kill()


class TrainLoader:
    """Loads the micro-batches of training for process `rank` of `world`.

    `bad` maps the index of each unreadable sample found so far to its error message; `merge_bad` adds those that other
    processes found. More than `data.max_bad_samples` raise UserError.
    """

    def __init__(
        self,
        source: SampleSource,
        task: Encoding,
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
        if data.cache_dir:
            check_folder(Path(data.cache_dir), f"data.cache_dir={data.cache_dir}")
        self.data, self.accumulate, self.rank, self.world = data, accumulate, rank, world
        self.dataset = _Samples(source, task, data, train=True)
        self.bad: dict[int, str] = {}
        #: Whether this process has found a bad sample since the last call of `merge_bad`.
        self.news = False

    def batches(self, start: int, stop: int) -> Generator[Batch, None, None]:
        """Yields the micro-batches of optimizer steps `start` to `stop` - 1, `accumulate` per step."""
        plan = _MicroBatches(self.plan, start, stop, self.accumulate, self.rank, self.world)
        with contextlib.closing(_load(self.dataset, plan, self.data.workers)) as loaded:
            for batch, _, bad in loaded:
                self.news = self.news or not bad.keys() <= self.bad.keys()
                self.bad |= bad
                self._refuse_too_many()
                if batch is None:
                    raise UserError(f"{next(iter(bad.values()))} (no other sample of its batch could be read either)")
                yield batch

    def merge_bad(self, found: Sequence[dict[int, str]]) -> None:
        """Adds the bad samples that each process has found. A sample counts once, however many found it."""
        for bad in found:
            self.bad |= bad
        self.news = False
        self._refuse_too_many()

    def _refuse_too_many(self) -> None:
        allowed = self.data.max_bad_samples
        if len(self.bad) > allowed:
            newest = list(self.bad.values())[-1]
            raise UserError(f"{newest} ({len(self.bad)} unreadable training samples, data.max_bad_samples={allowed})")


def eval_batches(
    source: SampleSource,
    task: Encoding,
    data: DataConfig,
    *,
    batch_size: int,
    workers: int,
    limit: int | None = None,
    rank: int = 0,
    world: int = 1,
) -> Iterator[tuple[Batch, list[Sample]]]:
    """Yields every sample (or the first `limit`) once, in batches without padding, with its evaluation view at native
    size.

    Process `rank` of `world` sees every world-th sample. Raises UserError for an unreadable sample.
    """
    count = len(source) if limit is None else min(limit, len(source))
    requests = [Request(i, 0, i) for i in range(rank, count, world)]
    batches = [requests[i : i + batch_size] for i in range(0, len(requests), batch_size)]
    dataset = _Samples(source, task, data, train=False)
    workers = min(workers, math.ceil(len(batches) / 2))
    with contextlib.closing(_load(dataset, batches, workers)) as loaded:
        for batch, views, bad in loaded:
            if batch is None or bad:
                raise UserError(next(iter(bad.values())))
            yield batch, [view for view in views if view is not None]
