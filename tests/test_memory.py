"""Too little memory, and places that cannot be written: one line each, before or after hours of work."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from tests.support.cli import failure
from tests.support.small import ORACLE
from uvim_fsq import cli
from uvim_fsq.errors import UserError, enough_memory
from uvim_fsq.inference.predictor import Predictor
from uvim_fsq.training.step import Stepper

CUDA = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1 is free."


def test_what_is_too_little_memory() -> None:
    for allocate in (
        lambda: torch.empty(10**14),
        lambda: nn.Linear(10**15, 10**15),
        lambda: np.empty(10**15),
    ):
        with pytest.raises(UserError, match="not enough memory .*; buy more") as caught, enough_memory("buy more"):
            allocate()
        assert "\n" not in str(caught.value)
    for other in (RuntimeError("shapes differ"), KeyError("out of memory")):
        with pytest.raises(type(other)), enough_memory(""):
            raise other


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
def test_a_model_that_is_too_large(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str], keys: list[str]
) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(yaml.safe_dump(ORACLE))
    said = failure(capsys, "train-oracle", file, f"data.root={data}", f"train.out={tmp_path / 'run'}", *keys)
    assert ("not enough memory" in said and "model.width" in said) or "must be below 2^31" in said or "64 bits" in said


def test_a_step_or_an_evaluation_that_needs_too_much(
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
    monkeypatch.setattr(predictor, "decoder", full)
    with pytest.raises(UserError, match="20.00 GiB.*lower eval.batch_size"):
        predictor.predict(np.zeros((9, 9, 3), np.uint8))
    monkeypatch.setattr("uvim_fsq.evaluation.evaluator.Evaluator.run", full)
    assert "lower eval.batch_size" in failure(capsys, "evaluate", lm_dir)


@pytest.mark.parametrize("place", ["file", "file/under", "/proc/nowhere/under"])
def test_places_are_tried_before_the_work(
    tmp_path: Path, lm_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    (tmp_path / "file").write_text("the user's")
    config = tmp_path / "a.yaml"
    config.write_text(yaml.safe_dump(ORACLE))
    target = tmp_path / place
    for work in (
        "uvim_fsq.training.run.train",
        "uvim_fsq.evaluation.run.evaluate",
        "uvim_fsq.experiments.analysis.analyze_run",
    ):
        monkeypatch.setattr(work, lambda *_, **__: pytest.fail("the work was begun"))
    size = ("--num", 1, "--size", 16)
    lists = (
        ("train-oracle", config, f"train.out={target}"),
        ("analyze", lm_dir, "--out", target),
        ("predict", lm_dir, config, "--out", target),
        ("synth", "--format", "nyu", *size, "--out", target),
        ("data", "coltran-lists", "--out", target),
        ("quickstart", "--out", target),
        ("import-uvim", config, "--task", "depth", "--out", target),
    )
    for arguments in lists:
        said = failure(capsys, *(str(a) for a in arguments))
        assert said.startswith("error: cannot write ") and "Traceback" not in said, arguments
    # A file in the place of a file is replaced.
    if place == "file":
        target = tmp_path
    for option in ("--csv", "--json", "--report"):
        assert "error: cannot write " in failure(capsys, "evaluate", lm_dir, option, target), option
    assert "error: cannot write " in failure(capsys, "benchmark", "metrics", "--json", target)
    assert (tmp_path / "file").read_text() == "the user's"


def test_a_device_is_written_as_it_is(lm_dir: Path) -> None:
    # A pipe: a fault that replaces devices would replace the machine's own /dev/null.
    end, start = os.pipe()
    cli.main(["evaluate", str(lm_dir), "--limit", "1", "--json", f"/dev/fd/{start}"])
    assert json.loads(os.read(end, 1 << 16))["images"] == 1
