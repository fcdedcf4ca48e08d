"""Configuration: round trips, and one clear line for everything a user mistypes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.support import small
from tests.support.small import ORACLE
from uvim_fsq.checkpoints.loading import build_oracle, build_task
from uvim_fsq.config.parse import describe_keys, dump_yaml, to_dict
from uvim_fsq.config.rules import resolve_levels, validate
from uvim_fsq.config.schema import LMRun, OracleRun
from uvim_fsq.errors import UserError
from uvim_fsq.lm.autoregressive import AutoregressiveLM
from uvim_fsq.tasks.configuration import load_run, resolve_lm

# Grids are no configurations; test_ablation looks after them.
CONFIGS = sorted(
    file for file in (Path(__file__).parents[1] / "configs").rglob("*.yaml") if file.parent.name != "ablations"
)


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
        ("=3", "not of the form key=value"),
        ("model.quantizer.levels=[8,6", "is not valid YAML"),
        ("plugins=my_module", "plugins='my_module': must be a list, e.g. plugins=[my_module]"),
        ("stage=[1]", "must be oracle or lm"),
        ("task.name=[1]", "task.name=[1]: must be text"),
        ("train.out=${nope}", "Interpolation key 'nope' not found"),
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
        ("optim.warmup_steps=6", "must be below train.steps"),
        ("eval.temperature=-1", "negative"),
        ("train.batch_size=0", "above 0"),
        ("model.patch_size=0", "above 0"),
        ("model.code_length=-4", "above 0"),
        ("model.decoder_depth=0", "above 0"),
        ("optim.lr=inf", "above 0"),
        ("optim.weight_decay=-1", "must not be negative"),
        ("data.workers=-1", "must not be negative"),
        ("train.seed=-1", "must not be negative"),
        ("eval.top_p=2", "at most 1"),
        ("optim.betas=[1.5,2]", "at least 0 and below 1"),
    ],
)
def test_impossible_combinations(override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        validate(load_run(ORACLE, ["train.out=x", override]))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("extends: a.yaml", "forms a cycle"),
        ("extends: b.yaml", "b.yaml: no such configuration file"),
        ("extends: [b.yaml]", "must be the path of one file"),
        ("train: {steps: 3}\ntrain: {seed: 3}", "duplicate key train"),
        ("1: 2\ntask: {name: nyu_depth}", "unknown key 1"),
        ("[1, 2]", "must hold keys and values"),
        ("3", "must hold keys and values"),
        ("train: [", "is not valid YAML"),
        ("train: {out: '${x'}\nextends: a.yaml", "no viable alternative"),
    ],
)
def test_broken_files(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.yaml").write_text(text + "\n")
    with pytest.raises(UserError) as caught:
        load_run(tmp_path / "a.yaml")
    assert message in str(caught.value)


def small_lm(*overrides: str) -> LMRun:
    run = load_run(small.LM, ["oracle=o", "train.out=x", *overrides])
    assert isinstance(run, LMRun)
    return run


def test_an_lm_inherits_only_what_was_not_given() -> None:
    oracle = load_run(ORACLE, ["data.root=rooms", "data.hflip=false", "data.crop=none"])
    assert isinstance(oracle, OracleRun)
    run = resolve_lm(small_lm(), oracle)
    assert (run.data.root, run.data.hflip, run.data.crop, run.data.image_size) == ("rooms", False, "none", 16)
    # Given values count, also where they are the schema's defaults, and whether or not the run went through a file.
    for given in (small_lm("data.hflip=true"), load_run(to_dict(small_lm("data.hflip=true")))):
        assert isinstance(given, LMRun)
        run = resolve_lm(given, oracle)
        assert (run.data.root, run.data.hflip, run.data.crop) == ("rooms", True, "none")
        assert load_run(to_dict(run)) == run and resolve_lm(run, oracle) == run
    for override, message in (
        ("data.image_size=512", "was trained at 16"),
        ("task.num_bins=8", "task.num_bins=8 but the oracle o was trained with 16"),
        ("task.decodin=x", "did you mean task.decoding"),
    ):
        with pytest.raises(UserError, match=message):
            resolve_lm(small_lm(override), oracle)


def test_every_key_is_documented() -> None:
    for cls in (OracleRun, LMRun):
        assert all(doc for *_, doc in describe_keys(cls))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda path: str(path.relative_to(path.parents[2])))
def test_shipped_configuration_builds(file: Path) -> None:
    run = load_run(file, ["train.out=runs/x"])
    validate(run)
    first = file.read_text().splitlines()
    assert any(line.startswith("# launch:") for line in first) and any(line.startswith("# expected:") for line in first)
    if isinstance(run, OracleRun) and run.task.name == "coco_panoptic":
        # What `resolve` reads from COCO's annotation file.
        categories = tuple((i, f"class {i}", i <= 80) for i in range(1, 134))
        run = replace(run, task=replace(run.task, options=replace(run.task.options, categories=categories)))
    with torch.device("meta"):
        if isinstance(run, OracleRun):
            build_oracle(run, build_task(run))
        else:
            codebook = 1
            for level in resolve_levels((7, 5, 5, 5, 5)):
                codebook *= level
            model = replace(run.model, encoder=replace(run.model.encoder, weights="none"))
            size = 32 if "quickstart" in file.name else 512
            AutoregressiveLM(model, image_size=size, vocab_size=codebook, length=256)


def test_there_are_configurations() -> None:
    assert len(CONFIGS) >= 6
