"""Commands that run out of memory say in one line what to change."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from tests.support.cli import failure
from tests.support.small import ORACLE
from uvim_fsq.errors import UserError
from uvim_fsq.inference.predictor import Predictor
from uvim_fsq.training.step import Stepper

CUDA = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1 is free."


@pytest.mark.parametrize(
    "keys",
    [
        ["model.width=1000000000", "model.num_heads=8"],
        ["model.width=2147483647", "model.num_heads=1", "model.mlp_dim=2147483647"],
        ["model.width=2147483648"],
        ["model.width=9223372036854775808"],
        ["model.mlp_dim=100000000000"],
    ],
)
def test_a_model_that_is_too_large_is_refused(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str], keys: list[str]
) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(yaml.safe_dump(ORACLE))
    said = failure(capsys, "train-oracle", file, f"data.root={data}", f"train.out={tmp_path / 'run'}", *keys)
    assert ("not enough memory" in said and "model.width" in said) or "must be below 2^31" in said or "64 bits" in said


def test_a_step_or_an_evaluation_without_memory_names_the_keys_to_change(
    tmp_path: Path, data: Path, lm_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError(CUDA)

    monkeypatch.setattr(Stepper, "optimizer_step", full)
    file = tmp_path / "a.yaml"
    file.write_text(yaml.safe_dump(ORACLE))
    said = failure(capsys, "train-oracle", file, f"data.root={data}", f"train.out={tmp_path / 'run'}")
    assert "20.00 GiB" in said and "lower train.batch_size, raise train.accumulate" in said
    predictor = Predictor.from_run(lm_dir)
    monkeypatch.setattr("uvim_fsq.inference.code_decoding.LMDecoder.parts", full)
    with pytest.raises(UserError, match="20.00 GiB.*lower eval.batch_size"):
        predictor.predict(np.zeros((9, 9, 3), np.uint8))
    monkeypatch.setattr("uvim_fsq.evaluation.evaluator.Evaluator.run", full)
    assert "lower eval.batch_size" in failure(capsys, "evaluate", lm_dir)
