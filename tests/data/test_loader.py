"""Batches are built in the worker processes: label types, unreadable samples, dead workers, shared memory."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.small import oracle_run
from uvim_fsq.checkpoints.loading import build_task
from uvim_fsq.data.loader import Item, TrainLoader, _start_worker, collate, eval_batches
from uvim_fsq.data.sample import smallest_integer
from uvim_fsq.errors import UserError

RNG = np.random.default_rng(0)
IMAGE = np.zeros((3, 2, 2), np.uint8)


def item(index: int, labels: np.ndarray, **bad: str) -> Item:
    return Item(index, str(index), IMAGE + index, {"x": labels}, {int(i[1:]): text for i, text in bad.items()})


@pytest.mark.parametrize("kind", ["uint8", "int8", "int16", "uint16", "int32", "int64", "float32", "bool"])
def test_labels_keep_their_type(kind: str) -> None:
    labels = [RNG.integers(0, 2, (4, 4)).astype(kind) for _ in range(3)]
    batch = collate([item(i, x) for i, x in enumerate(labels)]).batch
    assert batch is not None and batch["labels"]["x"].dtype == getattr(torch, kind)
    np.testing.assert_array_equal(batch["labels"]["x"].numpy(), np.stack(labels))
    assert batch["index"].tolist() == [0, 1, 2] and batch["id"] == ["0", "1", "2"]
    assert batch["image"].dtype == torch.uint8 and batch["image"].shape == (3, 3, 2, 2)


def test_labels_may_be_views_and_of_mixed_types() -> None:
    fixed = np.arange(16, dtype=np.int16).reshape(4, 4)
    fixed.flags.writeable = False
    mirrored = np.arange(16, dtype=np.uint8).reshape(4, 4)[:, ::-1]
    batch = collate([item(0, fixed), item(1, mirrored), item(2, fixed.T)]).batch
    assert batch is not None
    np.testing.assert_array_equal(batch["labels"]["x"].numpy(), np.stack([fixed, mirrored, fixed.T]))


def test_errors_are_kept_with_and_without_a_replacement_sample() -> None:
    labels = np.zeros((2, 2), np.uint8)
    done = collate([item(0, labels), item(1, labels, _7="a is broken"), {8: "b is broken", 7: "a is broken"}])
    assert done.bad == {7: "a is broken", 8: "b is broken"}
    assert done.batch is not None and done.batch["id"] == ["0", "1"]
    assert collate([{8: "b is broken"}]) == (None, [], {8: "b is broken"})


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_samples_are_counted_with_any_number_of_workers(tmp_path: Path, data: Path, workers: int) -> None:
    run = oracle_run(Path("x"), data)
    task = build_task(run)
    source = task.source(str(data), "train")
    victims = {3, 4}

    class Broken:
        info = source.info

        def __len__(self) -> int:
            return len(source)

        def __getitem__(self, index: int):
            if index in victims:
                raise UserError(f"number {index} is broken")
            return source[index]

    def load(allowed: int, stop: int) -> TrainLoader:
        config = replace(run.data, workers=workers, max_bad_samples=allowed)
        loader = TrainLoader(Broken(), task, config, batch_size=8, seed=0)
        assert not loader.news
        assert [len(batch["id"]) for batch in loader.batches(0, stop)] == [8] * stop
        return loader

    # Three epochs read each of them three times.
    loader = load(2, 9)
    assert dict(sorted(loader.bad.items())) == {3: "number 3 is broken", 4: "number 4 is broken"} and loader.news
    with pytest.raises(UserError, match="number . is broken .2 unreadable training samples, data.max_bad_samples=1"):
        load(1, 3)
    with pytest.raises(UserError, match="^number 3 is broken$"):
        list(eval_batches(Broken(), task, run.data, batch_size=4, workers=workers))


def test_unreadable_samples_of_other_processes_count_once(data: Path) -> None:
    run = oracle_run(Path("x"), data, "data.max_bad_samples=2")
    loader = TrainLoader(build_task(run).source(str(data), "train"), build_task(run), run.data, batch_size=8, seed=0)
    loader.bad, loader.news = {1: "one"}, True
    loader.merge_bad([{1: "one"}, {}, {2: "two", 1: "one"}])
    assert loader.bad == {1: "one", 2: "two"} and not loader.news
    with pytest.raises(UserError, match="^three .3 unreadable training samples, data.max_bad_samples=2"):
        loader.merge_bad([{2: "two"}, {3: "three"}])


class Stuck:
    """A source that calls `act` in the loader process before each sample."""

    def __init__(self, source, act) -> None:
        self.source, self.act, self.info = source, act, source.info

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int):
        self.act()
        return self.source[index]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("act", "match"),
    [
        (lambda: time.sleep(10_000), "has not delivered a batch in 1 s"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "died .*lower data.workers"),
    ],
    ids=["stuck", "killed"],
)
def test_a_stuck_or_killed_worker_is_one_line(data: Path, monkeypatch: pytest.MonkeyPatch, act, match: str) -> None:
    monkeypatch.setattr("uvim_fsq.data.loader.BATCH_TIMEOUT", 1 if "deliver" in match else 600)
    run = oracle_run(Path("x"), data, "data.workers=1")
    task = build_task(run)
    broken = Stuck(task.source(str(data), "train"), act)
    before = set(multiprocessing.active_children())
    with pytest.raises(UserError, match=match):
        list(TrainLoader(broken, task, run.data, batch_size=8, seed=0).batches(0, 2))
    with pytest.raises(UserError, match=match):
        list(eval_batches(broken, task, run.data, batch_size=8, workers=1))
    for worker in set(multiprocessing.active_children()) - before:
        worker.join(60)
    assert set(multiprocessing.active_children()) <= before, "a stuck process would keep the command from ending"


@pytest.mark.slow
def test_a_signal_to_a_worker_that_is_starting_is_ignored(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = _start_worker

    def start(number: int) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        original(number)

    monkeypatch.setattr("uvim_fsq.data.loader._start_worker", start)
    run = oracle_run(Path("x"), data)
    task = build_task(run)
    source = task.source(str(data), "train")
    read = [name for batch, _ in eval_batches(source, task, run.data, batch_size=8, workers=2) for name in batch["id"]]
    assert len(read) == len(source)


def test_a_worker_hands_over_shared_tensors_and_views(data: Path) -> None:
    run = oracle_run(Path("x"), data)
    task = build_task(run)
    source = task.source(str(data), "val")
    every = [list(eval_batches(source, task, run.data, batch_size=4, workers=workers)) for workers in (0, 2)]
    assert [len(views) for _, views in every[0]] == [4, 2]
    for (here, our_views), (there, their_views) in zip(*every, strict=True):
        assert there["image"].is_shared() and there["labels"]["depth"].is_shared() and there["id"] == here["id"]
        assert torch.equal(here["image"], there["image"]) and torch.equal(here["index"], there["index"])
        assert torch.equal(here["labels"]["depth"], there["labels"]["depth"])
        for ours, theirs in zip(our_views, their_views, strict=True):
            assert ours.id == theirs.id and ours.meta == theirs.meta
            np.testing.assert_array_equal(ours.image, theirs.image)
            np.testing.assert_array_equal(ours.maps["depth"], theirs.maps["depth"])


def test_too_little_shared_memory_is_one_line(data: Path) -> None:
    run = oracle_run(Path("x"), data)
    task = build_task(run)
    source = task.source(str(data), "train")

    class Small:
        info = source.info

        def __init__(self, problem: str) -> None:
            self.problem = problem

        def __len__(self) -> int:
            return len(source)

        def __getitem__(self, index: int):
            raise RuntimeError(self.problem)

    config = replace(run.data, workers=1)
    for problem, kind, match in (
        (
            "unable to allocate shared memory(shm) for file </torch_1>",
            UserError,
            "^no room .*data.workers",
        ),
        ("another problem", RuntimeError, "another problem"),
    ):
        with pytest.raises(kind, match=match):
            list(TrainLoader(Small(problem), task, config, batch_size=8, seed=0).batches(0, 1))


def test_smallest_integer_type_that_holds_a_range() -> None:
    kinds = [smallest_integer(*span).name for span in ((0, 255), (-1, 127), (-1, 128), (0, 256), (-1, 40000))]
    assert kinds == ["uint8", "int8", "int16", "int16", "int32"]
