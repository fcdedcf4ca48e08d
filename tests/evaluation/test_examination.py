"""What reports show besides metrics: values of single images, places of tokens, calibration."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.small import TASKS
from uvim_fsq.checkpoints.loading import LoadedRun
from uvim_fsq.config.schema import EvalConfig
from uvim_fsq.data.sample import Batch, Sample
from uvim_fsq.errors import UserError
from uvim_fsq.evaluation import decodings
from uvim_fsq.evaluation.decodings import changes, variants
from uvim_fsq.evaluation.examination import Examined, Examiner, image_values
from uvim_fsq.evaluation.run import evaluate_loaded
from uvim_fsq.inference.predictions import PredictFn, Predictions, lm_predictions
from uvim_fsq.tasks.base import Metric
from uvim_fsq.tasks.nyu_depth.metrics import DepthMetric

CPU = torch.device("cpu")
TRUTH = torch.tensor([[0, 1], [2, 1]])
TOKENS = torch.tensor([[0, 1], [2, 3]])


NO_SOURCE: Any = None


def no_metric() -> Metric:
    raise AssertionError("no metric is needed")


def found(confidence: torch.Tensor | None) -> Examined:
    """Two images of two tokens, the last of which is wrong."""

    depth = np.full((4, 4), 2.0, np.float32)
    samples = [Sample(name, np.zeros((4, 4, 3), np.uint8), {"depth": depth}) for name in "ab"]
    examiner = Examiner(TASKS["depth"], NO_SOURCE, 4)
    batch = Batch(image=torch.zeros(2, 3, 4, 4), labels={}, index=torch.tensor([5, 7]), id=["a", "b"])
    examiner.add(batch, Predictions([depth, depth + 1], TOKENS, None, TRUTH, confidence), samples)
    return examiner.finish(no_metric, "rmse", [{"id": "b", "rmse": 1.0}, {"id": "a", "rmse": 0.0}], None)


def test_images_keep_their_place_in_the_split() -> None:
    assert found(None).values == [("b", 7, 1.0), ("a", 5, 0.0)]


def test_tokens_are_counted_by_place_and_code() -> None:
    examined = found(None)
    assert examined.positions is not None and examined.right is not None
    assert examined.positions.tolist() == [[1, 0, 1, 0], [0, 1, 0, 1]] and examined.right.tolist() == [1, 0.5]


def test_the_calibration_error_weights_ranges_by_their_tokens() -> None:
    calibration = found(torch.tensor([[1.0, 0.9], [0.9, 0.6]])).calibration
    assert calibration is not None and calibration.tokens.sum() == 4
    # Certain and right; two at 0.9, both right; one at 0.6, wrong.
    assert calibration.error == pytest.approx((0 + 2 * 0.1 + 0.6) / 4)
    assert calibration.tokens[-1] == 1 and calibration.tokens[0] == 0


def test_without_confidence_there_is_no_calibration() -> None:
    assert found(None).calibration is None


def test_a_figure_that_rows_lack_is_computed_from_the_states() -> None:
    metric = DepthMetric("p")
    states = {"sums": np.zeros((2, 6)), "counts": np.zeros((2, 5))}
    states["sums"][0, 0], states["counts"][0] = 0.25, [1, 0, 0, 1, 4]
    rows = [{"id": "a", "other": 1.0}, {"id": "skipped", "other": 1.0}]
    assert image_values(lambda: metric, "rmse", rows, (["a", "skipped"], states)) == [("a", 0.25)]
    assert image_values(no_metric, "fid", rows, None) == []


def test_an_examined_evaluation_has_the_same_result(random_lm: LoadedRun) -> None:
    examined: dict[str, Examined] = {}
    result = evaluate_loaded(random_lm, limit=3, device=CPU, examined=examined)
    assert result == evaluate_loaded(random_lm, limit=3, device=CPU)
    assert set(examined) == set(result["figures"]) and "decodings" not in result
    assert [len(x.values) for x in examined.values()] == [3] * len(examined)
    lm = examined["lm"]
    assert lm.positions is not None and lm.positions.sum(0).tolist() == result["code_counts"]["lm"]
    assert lm.calibration is not None and lm.calibration.tokens.sum() == 3 * 4
    assert "Error by depth" in lm.tables and examined["oracle"].calibration is None


def test_other_decodings_are_measured_if_asked_for(random_lm: LoadedRun) -> None:
    result = evaluate_loaded(random_lm, limit=3, device=CPU, decodings=True)
    found = result["decodings"]
    assert found[0] == {"settings": {}, "figures": result["figures"]["lm"]}
    assert [item["settings"] for item in found[1:]] == [
        {"codes": "soft"},
        {"temperature": 1.0},
        {"temperature": 1.0, "samples": 4},
        {"code_scale": 0.5},
        {"context_weight": 0.3},
    ]
    assert all(item["figures"]["images"] == 3 for item in found)
    assert len({item["figures"]["rmse"] for item in found}) == len(found)


def test_other_decodings_fit_the_run(random_lm: LoadedRun) -> None:
    lm, own = random_lm.lm, random_lm.run.eval
    assert lm is not None
    random = replace(own, temperature=0.7, samples=2)
    tried = [changes(setting, random) for setting in variants(lm, random, "none")]
    assert tried[0] == {} and {"temperature": 0.0, "samples": 1} in tried
    assert not any("context_weight" in changed or "steps" in changed for changed in tried)


def test_decodings_that_the_token_model_refuses_are_left_out(
    random_lm: LoadedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    def only_hard(lm: Any, oracle: Any, task: Any, config: EvalConfig) -> PredictFn:
        if config.codes == "soft" or config.temperature:
            raise UserError("not supported")
        return lm_predictions(lm, oracle, task, config)

    monkeypatch.setattr(decodings, "lm_predictions", only_hard)
    result = evaluate_loaded(random_lm, limit=2, device=CPU, decodings=True)
    assert [list(item["settings"]) for item in result["decodings"]] == [[], ["code_scale"], ["context_weight"]]
