"""Models with random weights, and batches of the evaluation split."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import nn

from uvim_fsq.checkpoints.loading import LoadedDirect, LoadedRun
from uvim_fsq.data.sample import Batch
from uvim_fsq.evaluation.evaluator import Evaluator
from uvim_fsq.inference.predictions import (
    Predictions,
)


def shake(model: nn.Module) -> None:
    """Sets all weights at random, because heads start at zero."""
    torch.manual_seed(1)
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)


def batch_of(loaded: LoadedRun | LoadedDirect, count: int) -> Batch:
    """The first `count` images of the evaluation split."""
    config = replace(loaded.run.eval, batch_size=count)
    evaluator = Evaluator(loaded.task, loaded.run.data, config, limit=count)
    given: list[Batch] = []

    def keep(batch: Batch) -> Predictions:
        given.append(batch)
        return Predictions([np.ones((16, 16))] * len(batch["image"]), None)

    evaluator.run(keep, torch.device("cpu"))
    (batch,) = given
    return batch
