"""What the result of an evaluation holds."""

from __future__ import annotations

import csv
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import uvim_fsq
from tests.support.evaluation import batch_of
from uvim_fsq.checkpoints.files import file_hash
from uvim_fsq.checkpoints.loading import load_checkpoint
from uvim_fsq.errors import UserError
from uvim_fsq.evaluation.run import evaluate
from uvim_fsq.inference.predictions import (
    lm_predictions,
)
from uvim_fsq.oracle.quantizers.fsq import FSQ

CPU = torch.device("cpu")
IMAGES = 6


KEYS = [
    "eval.codes=soft",
    "eval.code_scale=0.9",
    "eval.context_weight=0.25",
    "eval.samples=2",
    "eval.temperature=0.5",
    "eval.top_k=4",
    "eval.seed=9",
]


@pytest.fixture(scope="module")
def evaluated(
    random_runs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[dict[str, Any], Path]]:
    """The result for the LM and the folder of its files."""
    out = tmp_path_factory.mktemp("evaluated")
    folders: list[Path] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("uvim_fsq.tasks.nyu_depth.task.NYUDepth.official", lambda self, out, source: folders.append(out))
        result = evaluate(random_runs[1], KEYS, csv=out / "deep" / "rows.csv", baseline=True, official=out / "official")
    assert folders == [out / "official" / way for way in result["figures"]]
    yield result, out


def test_a_result_holds_the_metrics_of_every_kind_of_prediction(evaluated: tuple[dict[str, Any], Path]) -> None:
    result, _ = evaluated
    assert list(result["figures"]) == ["baseline", "oracle", "context_only", "lm"]
    assert result["baseline"] == "mean depth map of the training set"
    assert (result["images"], result["limit"]) == (IMAGES, None)
    for name, figures in result["figures"].items():
        assert figures["images"] == IMAGES
        assert ("codebook_usage" in figures) == (name in ("oracle", "lm"))
        assert ("bits_per_token" in figures) == (name == "lm")


def test_a_result_counts_codes_and_levels(
    evaluated: tuple[dict[str, Any], Path], random_runs: tuple[Path, Path]
) -> None:
    result, _ = evaluated
    loaded = load_checkpoint(random_runs[1], KEYS)
    batch = batch_of(loaded, IMAGES)
    assert loaded.lm is not None
    with torch.inference_mode():
        tokens = {
            "oracle": loaded.oracle.tokenize(batch["labels"], batch["image"]),
            "lm": lm_predictions(loaded.lm, loaded.oracle, loaded.task, loaded.run.eval)(batch).tokens,
        }
    quantizer = loaded.oracle.quantizer
    assert isinstance(quantizer, FSQ)
    for name, found in tokens.items():
        assert found is not None
        assert result["code_counts"][name] == torch.bincount(found.flatten(), minlength=25).tolist()
        digits = quantizer.indices_to_digits(found).flatten(0, 1)
        assert result["level_histogram"][name] == [torch.bincount(d, minlength=5).tolist() for d in digits.T]
    assert set(result["code_counts"]) == set(result["level_histogram"]) == {"oracle", "lm"}


def test_the_table_holds_the_metrics_of_each_image(evaluated: tuple[dict[str, Any], Path]) -> None:
    result, out = evaluated
    with (out / "deep" / "rows.csv").open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    assert [row["way"] for row in rows] == [name for name in result["figures"] for _ in range(IMAGES)]
    for name, figures in result["figures"].items():
        own = [float(row["rmse"]) for row in rows if row["way"] == name]
        assert np.mean(own) == pytest.approx(figures["rmse"])


def test_a_result_holds_its_provenance(evaluated: tuple[dict[str, Any], Path], random_runs: tuple[Path, Path]) -> None:
    result, _ = evaluated
    loaded = load_checkpoint(random_runs[1], KEYS)
    assert result["decoding"] == {
        "codes": "soft",
        "code_scale": 0.9,
        "context_weight": 0.25,
        "samples": 2,
        "temperature": 0.5,
        "top_k": 4,
        "top_p": None,
        "steps": None,
        "choice_temperature": 0.0,
        "seed": 9,
        "precision": "fp32",
        "int8_cross_kv": False,
    }
    assert (result["task"], result["protocol"], result["main_metric"]) == ("nyu_depth", "nyu_depth/full", "rmse")
    assert result["data"]["count"] == IMAGES and result["data"]["image_size"] == 16
    assert result["task_options"]["num_bins"] == 16
    assert result["checkpoint"] == str(loaded.checkpoint)
    assert result["checkpoint_sha256"] == file_hash(loaded.checkpoint / "model.safetensors")
    assert result["versions"] == {
        "uvim_fsq": uvim_fsq.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": "cpu",
    }


def test_an_oracle_is_evaluated_without_an_lm(random_runs: tuple[Path, Path]) -> None:
    result = evaluate(random_runs[0], limit=4)
    assert list(result["figures"]) == ["oracle", "context_only"] and result["baseline"] is None
    assert result["images"] == result["limit"] == result["figures"]["oracle"]["images"] == 4


def test_the_limit_argument_takes_precedence(random_runs: tuple[Path, Path]) -> None:
    for key, limit, images in (("null", None, 6), ("3", None, 3), ("3", 2, 2)):
        again = evaluate(random_runs[0], [f"eval.limit={key}"], limit=limit)
        assert again["images"] == images and again["limit"] == (None if images == 6 else images)
    for limit in (0, -1):
        with pytest.raises(UserError, match=f"limit={limit}: "):
            evaluate(random_runs[0], limit=limit)
