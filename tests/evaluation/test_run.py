"""What the result of an evaluation holds."""

from __future__ import annotations

import csv
import platform
from pathlib import Path

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


def test_a_result_holds_metrics_code_counts_and_provenance(
    random_runs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []
    monkeypatch.setattr("uvim_fsq.tasks.nyu_depth.task.NYUDepth.official", lambda self, out, source: given.append(out))
    file = tmp_path / "deep" / "rows.csv"
    keys = ["eval.temperature=0.5", "eval.top_k=4", "eval.seed=9"]
    result = evaluate(random_runs[1], keys, csv=file, baseline=True, official=tmp_path / "official")
    assert list(result["figures"]) == ["baseline", "oracle", "context_only", "lm"]
    assert given == [tmp_path / "official" / way for way in result["figures"]]
    assert result["baseline"] == "mean depth map of the training set"
    assert (result["images"], result["limit"]) == (IMAGES, None)
    for way, figures in result["figures"].items():
        assert figures["images"] == IMAGES
        assert ("codebook_usage" in figures) == (way in ("oracle", "lm"))
        assert ("bits_per_token" in figures) == (way == "lm")
    random_lm = load_checkpoint(random_runs[1], keys)
    batch = batch_of(random_lm, IMAGES)
    assert random_lm.lm is not None
    with torch.inference_mode():
        tokens = {
            "oracle": random_lm.oracle.tokenize(batch["labels"], batch["image"]),
            "lm": lm_predictions(random_lm.lm, random_lm.oracle, random_lm.task, random_lm.run.eval)(batch).tokens,
        }
    quantizer = random_lm.oracle.quantizer
    assert isinstance(quantizer, FSQ)
    for way, found in tokens.items():
        assert found is not None
        assert result["code_counts"][way] == torch.bincount(found.flatten(), minlength=25).tolist()
        digits = quantizer.indices_to_digits(found).flatten(0, 1)
        assert result["level_histogram"][way] == [torch.bincount(d, minlength=5).tolist() for d in digits.T]
    assert set(result["code_counts"]) == set(result["level_histogram"]) == {"oracle", "lm"}
    with file.open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    assert [row["way"] for row in rows] == [way for way in result["figures"] for _ in range(IMAGES)]
    for way, figures in result["figures"].items():
        own = [float(row["rmse"]) for row in rows if row["way"] == way]
        assert np.mean(own) == pytest.approx(figures["rmse"])
    decoding = {"temperature": 0.5, "top_k": 4, "top_p": None, "seed": 9, "precision": "fp32", "int8_cross_kv": False}
    assert result["decoding"] == decoding
    assert (result["task"], result["protocol"], result["main_metric"]) == ("nyu_depth", "nyu_depth/full", "rmse")
    assert result["data"]["count"] == IMAGES and result["data"]["image_size"] == 16
    assert result["task_options"]["num_bins"] == 16
    assert result["checkpoint"] == str(random_lm.checkpoint)
    assert result["checkpoint_sha256"] == file_hash(random_lm.checkpoint / "model.safetensors")
    assert result["versions"] == {
        "uvim_fsq": uvim_fsq.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": "cpu",
    }


def test_an_oracle_is_evaluated_without_an_lm(random_runs: tuple[Path, Path], tmp_path: Path) -> None:
    result = evaluate(random_runs[0], limit=4)
    assert list(result["figures"]) == ["oracle", "context_only"] and result["baseline"] is None
    assert result["images"] == result["limit"] == result["figures"]["oracle"]["images"] == 4
    for key, limit, images in (("null", None, 6), ("3", None, 3), ("3", 2, 2)):
        again = evaluate(random_runs[0], [f"eval.limit={key}"], limit=limit)
        assert again["images"] == images and again["limit"] == (None if images == 6 else images)
    for limit in (0, -1):
        with pytest.raises(UserError, match=f"limit={limit}: "):
            evaluate(random_runs[0], limit=limit)
