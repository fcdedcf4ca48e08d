"""Configuration: round trips, and one clear line for everything a user mistypes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.small import ORACLE
from uvim_fsq.config import LMRun, OracleRun
from uvim_fsq.config_io import describe_keys, dump_yaml, load_run, to_dict, validate
from uvim_fsq.errors import UserError
from uvim_fsq.lm.model import LM
from uvim_fsq.models import build_oracle, build_task
from uvim_fsq.oracle.fsq import resolve_levels

CONFIGS = sorted((Path(__file__).parents[1] / "configs").rglob("*.yaml"))


def test_round_trip(tmp_path: Path) -> None:
    run = load_run(ORACLE, ["train.out=x", "model.quantizer.levels=2^12", "optim.lr=3e-4", "plugins=[]"])
    assert isinstance(run, OracleRun)
    assert run.optim.lr == 3e-4 and run.model.quantizer.levels == "2^12" and run.task.options.num_bins == 16
    assert load_run(to_dict(run)) == run
    (tmp_path / "a.yaml").write_text(dump_yaml(run))
    (tmp_path / "b.yaml").write_text("extends: a.yaml\ntrain: {steps: 9}\n")
    assert load_run(tmp_path / "b.yaml").train.steps == 9


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lrr=1", "unknown key optim.lrr; did you mean optim.lr"),
        ("task.num_bin=3", "did you mean task.num_bins"),
        ("trian.steps=3", "did you mean train"),
        ("train.steps=many", "train.steps='many': must be an integer or null"),
        ("model.context=all", "must be one of both, encoder, decoder, none"),
        ("task.name=nyu", "unknown task 'nyu'; did you mean 'nyu_depth'"),
        ("plugins=[no_such_module]", "cannot be imported"),
        ("model.quantizer.levels=5", "model.quantizer.levels"),
        ("data.crop_area=[0.1]", "must have 2 entries"),
        ("steps", "not of the form key=value"),
    ],
)
def test_typing_errors(override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_run(ORACLE, [override])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.image_size=18", "not divisible by model.patch_size"),
        ("model.code_length=5", "not a square"),
        ("model.code_length=64", "exceeds the 16 patches"),
        ("model.num_heads=3", "not divisible by model.num_heads"),
        ("model.quantizer.levels=[5,1]", "at least 2 levels"),
        ("train.epochs=2", "exactly one of train.epochs and train.steps"),
        ("train.accumulate=3", "not divisible by train.accumulate"),
        ("optim.warmup_steps=6", "must be below train.steps"),
        ("eval.temperature=-1", "negative"),
        ("train.batch_size=0", "above 0"),
    ],
)
def test_impossible_combinations(override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        validate(load_run(ORACLE, ["train.out=x", override]))
    assert message in str(caught.value)


def test_every_key_is_documented() -> None:
    for cls in (OracleRun, LMRun):
        assert all(doc for *_, doc in describe_keys(cls))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda path: str(path.relative_to(path.parents[2])))
def test_shipped_configuration_builds(file: Path) -> None:
    run = load_run(file, ["train.out=runs/x"])
    first = file.read_text().splitlines()
    assert any(line.startswith("# launch:") for line in first) and any(line.startswith("# expected:") for line in first)
    with torch.device("meta"):
        if isinstance(run, OracleRun):
            validate(run)
            build_oracle(run, build_task(run))
        else:
            codebook = 1
            for level in resolve_levels((7, 5, 5, 5, 5)):
                codebook *= level
            model = replace(run.model, encoder=replace(run.model.encoder, weights="none"))
            size = 32 if "quickstart" in file.name else 512
            LM(model, image_size=size, vocab_size=codebook, length=256)


def test_there_are_configurations() -> None:
    assert len(CONFIGS) >= 6
