"""The number of micro batches that fit."""

from __future__ import annotations

from dataclasses import replace

from uvim_fsq.config.schema import TrainConfig
from uvim_fsq.performance.memory import (
    LOGIT_BYTES,
    TrainingMemory,
    smallest_accumulate,
)


def test_the_smallest_accumulation_that_fits() -> None:
    memory, train = TrainingMemory(fixed=100.0, image=10.0), TrainConfig(batch_size=12)
    found = [smallest_accumulate(memory, train, available) for available in (220, 219, 160, 159, 139, 110, 109)]
    assert found == [1, 2, 2, 3, 4, 12, None]
    assert smallest_accumulate(memory, replace(train, accumulate=4), 1000) == 4
    assert smallest_accumulate(memory, replace(train, accumulate=5), 130) == 5, "uneven, but the user's own"
    assert smallest_accumulate(memory, train, 130, processes=2) == 2 and smallest_accumulate(memory, train, 120, 5) == 2


def test_label_logits_count_up_to_their_limit() -> None:
    logits = TrainingMemory(fixed=100.0, image=10.0, logits=2**27, max_logits=2**28)
    assert logits.of(1) == 110 + LOGIT_BYTES * 2**27
    assert logits.of(3) == 130 + LOGIT_BYTES * 2**28
