"""Configurations of the direct baseline: what belongs into them and what does not."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from tests.support.paths import CONFIGS, ROOT
from tests.support.small import DIRECT
from uvim_fsq.config.parse import to_dict
from uvim_fsq.config.rules import validate
from uvim_fsq.config.schema import DirectRun, LMRun, OracleRun
from uvim_fsq.errors import UserError
from uvim_fsq.tasks.configuration import load_run, without_token_keys

FILES = sorted([*CONFIGS.rglob("*direct.yaml"), *ROOT.glob("examples/*/*direct.yaml")])


@pytest.mark.parametrize(
    ("key", "stage"),
    [
        ("oracle=runs/oracle", "lm"),
        ("model.code_length=16", "oracle"),
        ("model.context=none", "oracle"),
        ("model.quantizer.levels=[5,5]", "oracle"),
        ("model.dropout=0.1", "lm"),
        ("loss.task_weight=1", "lm"),
        ("eval.temperature=0.7", "lm"),
    ],
)
def test_a_key_of_the_other_stages_is_refused_by_its_name(key: str, stage: str) -> None:
    name = key.partition("=")[0]
    with pytest.raises(UserError, match=f"^{name} is a key of stage {stage}; a direct run has no tokens, remove it$"):
        load_run(DIRECT, [key])


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("model.patch_size=3", "data.image_size=16 is not divisible by model.patch_size=3"),
        ("model.num_heads=3", "model.width=16 is not divisible by model.num_heads=3"),
        ("model.depth=0", "model.depth=0: must be above 0"),
        ("eval.limit=0", "eval.limit=0: must be above 0"),
    ],
)
def test_impossible_settings_are_refused(key: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        validate(load_run(DIRECT, ["train.out=x", key]))


def test_a_direct_run_needs_a_task() -> None:
    with pytest.raises(UserError, match="task.name is missing"):
        load_run({key: value for key, value in DIRECT.items() if key != "task"})


def test_a_configuration_survives_its_own_text() -> None:
    run = load_run(DIRECT)
    assert isinstance(run, DirectRun) and load_run(to_dict(run)) == run


def test_overrides_of_a_run_with_tokens_without_those_about_tokens() -> None:
    kept = ["data.root=x", "task.decoding=argmax", "eval.limit=3", "train.steps=2"]
    assert without_token_keys(["eval.temperature=1", *kept, "oracle=runs/o", "eval.seed=3"]) == kept


def of_stage(file: Path, stage: str) -> Any:
    """The configuration of another stage that belongs to a direct one."""
    name = file.name.replace("direct", stage)
    # A pretrained encoder has no oracle of its own.
    return load_run(file.with_name(name.replace("pretrained_", "") if stage == "oracle" else name))


@pytest.mark.parametrize("file", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_shipped_baseline_differs_from_the_lm_only_in_what_it_lacks(file: Path) -> None:
    """The same encoder, optimizer, steps, batch, data and task, or the comparison would not be fair."""
    direct, lm, oracle = load_run(file), of_stage(file, "lm"), of_stage(file, "oracle")
    assert isinstance(direct, DirectRun) and isinstance(lm, LMRun) and isinstance(oracle, OracleRun)
    assert direct.model.encoder == lm.model.encoder and direct.model.width == lm.model.width
    assert direct.optim == lm.optim and direct.task == oracle.task and direct.plugins == oracle.plugins
    assert {**to_dict(direct.train), "out": ""} == {**to_dict(lm.train), "out": ""}
    assert {**to_dict(direct.data), "workers": 0} == {**to_dict(oracle.data), "workers": 0}
    basic = [field.name for field in fields(direct.eval)]
    assert all(getattr(direct.eval, name) == getattr(lm.eval, name) for name in basic)


def test_every_small_lm_has_its_baseline() -> None:
    small = {file for file in CONFIGS.rglob("*_lm.yaml") if file.name.startswith(("quickstart", "camvid", "sample"))}
    assert small and {file.with_name(file.name.replace("_lm", "_direct")) for file in small} <= set(FILES)
