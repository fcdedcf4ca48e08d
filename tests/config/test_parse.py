"""Configurations are read and written back, and a mistyped key or value gets one clear line."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.small import ORACLE
from uvim_fsq.config.parse import describe_keys, dump_yaml, to_dict
from uvim_fsq.config.schema import STAGES, OracleRun
from uvim_fsq.errors import UserError
from uvim_fsq.tasks.configuration import load_run


def test_a_run_survives_a_round_trip_through_yaml(tmp_path: Path) -> None:
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
        ("stage=[1]", "must be one of oracle, lm, direct"),
        ("task.name=[1]", "task.name=[1]: must be text"),
        ("train.out=${nope}", "Interpolation key 'nope' not found"),
    ],
)
def test_a_mistyped_override_is_named_with_a_suggestion(override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_run(ORACLE, [override])
    assert message in str(caught.value)


def test_a_text_in_place_of_a_list_of_overrides_is_named() -> None:
    with pytest.raises(UserError, match=r"^overrides='train.steps=3' is one text; give a list, \['train.steps=3'\]$"):
        load_run(ORACLE, "train.steps=3")


def test_every_key_is_documented() -> None:
    for cls in STAGES.values():
        assert all(doc for *_, doc in describe_keys(cls))


def test_keys_of_another_task_name_their_task() -> None:
    for override, message in (
        ("task.max_instances=3", "task.max_instances is a key of coco_panoptic, not of task.name=nyu_depth"),
        ("task.inception_weights=x", "task.inception_weights is a key of imagenet_color, not of task.name=nyu_depth"),
        ("task.max_instanses=3", "unknown key task.max_instanses; known keys: "),
        ("task.num_bin=3", "unknown key task.num_bin; did you mean task.num_bins?"),
    ):
        with pytest.raises(UserError) as caught:
            load_run(ORACLE, [override])
        assert message in str(caught.value)
