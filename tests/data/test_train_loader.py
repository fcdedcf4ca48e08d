"""Training batches: order, workers, processes and accumulation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.support.small import oracle_run
from uvim_fsq.checkpoints.loading import build_task
from uvim_fsq.data.loader import TrainLoader, TrainPlan, rank_slice
from uvim_fsq.errors import UserError


def test_workers_do_not_change_the_data(data: Path) -> None:
    run = oracle_run(Path("x"), data)
    task = build_task(run)
    batches = []
    for workers in (0, 2):
        config = replace(run.data, workers=workers)
        loader = TrainLoader(task.source(str(data), "train"), task, config, batch_size=8, seed=3)
        batches.append(list(loader.batches(2, 5)))
    assert len(batches[0]) == 3
    for one, two in zip(*batches, strict=True):
        assert one["id"] == two["id"] and torch.equal(one["image"], two["image"])
        assert torch.equal(one["labels"]["depth"], two["labels"]["depth"])


def test_the_plan_visits_every_sample_once_per_epoch() -> None:
    plan = TrainPlan(20, 5, seed=1)
    epochs = [[r.index for step in range(4 * e, 4 * e + 4) for r in plan.step(step)] for e in range(3)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs) and epochs[0] != epochs[1]
    requests = plan.step(2)
    parts = [rank_slice(requests, micro, 2, rank, 2) for micro in range(2) for rank in range(2)]
    assert [r for part in parts for r in part] == requests


def test_a_batch_smaller_than_its_parts_is_refused(data: Path) -> None:
    run = oracle_run(Path("x"), data)
    task = build_task(run)
    with pytest.raises(UserError, match="smaller than processes x accumulation .3 x 3"):
        TrainLoader(task.source(str(data), "train"), task, run.data, batch_size=8, seed=0, accumulate=3, world=3)
