"""What the evaluator counts and averages."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from uvim_fsq.checkpoints.loading import LoadedRun
from uvim_fsq.data.sample import Batch
from uvim_fsq.errors import UserError
from uvim_fsq.evaluation import run as evaluation
from uvim_fsq.evaluation.evaluator import Evaluator
from uvim_fsq.evaluation.run import evaluate_loaded
from uvim_fsq.inference.predictions import (
    Predictions,
)
from uvim_fsq.tasks.base import OfficialResults

CPU = torch.device("cpu")
IMAGES = 6


def constant(bits: list[float] | None = None, tokens: int = 4) -> Any:
    """Predicts 1 m everywhere; all tokens of image i are i."""

    def predict(batch: Batch) -> Predictions:
        index = batch["index"]
        cost = torch.tensor(bits)[index] if bits is not None else None
        return Predictions([np.ones((16, 16))] * len(index), index[:, None].expand(-1, tokens), cost)

    return predict


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_metrics_are_means_over_all_images(random_lm: LoadedRun, batch_size: int) -> None:
    run = random_lm.run
    config = replace(run.eval, batch_size=batch_size)
    evaluator = Evaluator(random_lm.task, run.data, config, quantizer=random_lm.oracle.quantizer)
    assert evaluator.protocol == "" and evaluator.rows == []
    for _ in range(2):  # a second run replaces the rows
        evaluator.statistics = evaluation.CodeStatistics(random_lm.oracle.quantizer)
        figures = evaluator.run(constant([3.0, 5.0, 1.0, 2.0, 4.0, 6.5]), CPU)
        depths = [evaluator.source[i].maps["depth"] for i in range(IMAGES)]
        errors = [np.sqrt(np.mean((d[(d > 1e-3) & (d < 10)] - 1.0) ** 2, dtype=np.float64)) for d in depths]
        assert [row["id"] for row in evaluator.rows] == [evaluator.source[i].id for i in range(IMAGES)]
        assert [row["rmse"] for row in evaluator.rows] == pytest.approx(errors, rel=1e-5)
        assert figures["rmse"] == pytest.approx(np.mean(errors), rel=1e-5) and figures["images"] == IMAGES
        assert figures["bits_per_image"] == pytest.approx(21.5 / 6)
        assert figures["bits_per_token"] == pytest.approx(21.5 / 24)
        assert figures["codebook_usage"] == 6 / 25 and figures["tokens_counted"] == 24
        assert figures["code_perplexity"] == pytest.approx(6)
    assert evaluator.protocol == "nyu_depth/full"
    bare = Evaluator(random_lm.task, run.data, config)
    assert bare.statistics is None
    assert not {"bits_per_token", "bits_per_image", "codebook_usage"} & set(bare.run(constant(), CPU))


def test_metrics_add_up_over_processes(random_lm: LoadedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulates two processes that evaluated the same images."""
    evaluator = Evaluator(random_lm.task, random_lm.run.data, random_lm.run.eval, quantizer=random_lm.oracle.quantizer)
    alone = evaluator.run(constant([3.0, 5.0, 1.0, 2.0, 4.0, 6.5]), CPU)
    monkeypatch.setattr(evaluation.processes, "gather", lambda mine: [mine, mine])
    evaluator = Evaluator(random_lm.task, random_lm.run.data, random_lm.run.eval, quantizer=random_lm.oracle.quantizer)
    official = Official()
    together = evaluator.run(constant([3.0, 5.0, 1.0, 2.0, 4.0, 6.5]), CPU, official)
    assert together.pop("official/score") == 0.5 and len(official.finished[0]) == 2 * IMAGES
    assert together == pytest.approx({**alone, "images": 12, "tokens_counted": 48})
    result = evaluate_loaded(random_lm, limit=2, device=CPU)
    assert result["images"] == 4 and sum(result["code_counts"]["lm"]) == 2 * 2 * 4


def test_the_limit_argument_overrides_the_configuration(random_lm: LoadedRun) -> None:
    """A limit above the number of images means all of them."""
    data = random_lm.run.data
    for given, key, images in ((None, None, 6), (None, 5, 5), (2, 5, 2), (2, None, 2), (99, None, 6)):
        evaluator = Evaluator(random_lm.task, data, replace(random_lm.run.eval, limit=key), limit=given)
        assert evaluator.limit == (given or key)
        assert evaluator.run(constant(), CPU)["images"] == len(evaluator.rows) == images


def test_predictions_use_the_configured_precision(random_lm: LoadedRun) -> None:
    for precision, expected in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        seen = []

        def predict(batch: Batch, seen: list[Any] = seen) -> Predictions:
            seen.append((torch.ones(1, 1) @ torch.ones(1, 1)).dtype)
            assert torch.is_inference_mode_enabled()
            return Predictions([np.ones((16, 16))] * len(batch["image"]), None)

        Evaluator(random_lm.task, random_lm.run.data, replace(random_lm.run.eval, precision=precision)).run(
            predict, CPU
        )
        assert set(seen) == {expected}


class Official(OfficialResults):
    def __init__(self, refuses: bool = False) -> None:
        self.refuses, self.finished = refuses, []

    def add(self, prediction: Any, sample: Any) -> Any:
        assert prediction.shape == (16, 16)
        return sample.id

    def finish(self, entries: list[Any]) -> dict[str, float]:
        if self.refuses:
            raise UserError("it is not installed")
        self.finished.append(entries)
        return {"score": 0.5}


def test_official_scores_are_added_to_our_metrics(random_lm: LoadedRun) -> None:
    evaluator, official = Evaluator(random_lm.task, random_lm.run.data, random_lm.run.eval), Official()
    figures = evaluator.run(constant(), CPU, official)
    assert figures["official/score"] == 0.5 and official.finished == [[row["id"] for row in evaluator.rows]]
    with pytest.warns(UserWarning, match="no official scores: it is not installed"):
        without = evaluator.run(constant(), CPU, Official(refuses=True))
    del figures["official/score"]
    assert without == figures
