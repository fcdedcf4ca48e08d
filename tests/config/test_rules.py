"""Values that are out of range, and combinations that cannot work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.cli import failure
from tests.support.small import DIRECT, LM, ORACLE
from uvim_fsq.config.rules import validate
from uvim_fsq.errors import UserError
from uvim_fsq.tasks.configuration import load_run


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
        ("optim.lr=inf", "optim.lr=inf: must be finite"),
        ("optim.weight_decay=-1", "must not be negative"),
        ("data.workers=-1", "must not be negative"),
        ("train.seed=-1", "must not be negative"),
        ("eval.top_p=2", "at most 1"),
        ("optim.betas=[1.5,2]", "at least 0 and below 1"),
        ("eval.context_weight=1.5", "eval.context_weight=1.5: must be at most 1"),
        ("eval.context_weight=-0.1", "eval.context_weight=-0.1: must not be negative"),
        ("eval.code_scale=-1", "eval.code_scale=-1.0: must not be negative"),
        ("eval.code_scale=inf", "eval.code_scale=inf: must be finite"),
        ("eval.code_scale=nan", "eval.code_scale=nan: must be finite"),
        ("optim.lr=nan", "optim.lr=nan: must be finite"),
        ("eval.samples=0", "eval.samples=0: must be above 0"),
        ("eval.samples=4", "eval.samples=4 with eval.temperature=0: greedy decoding has only one prediction; set"),
        ("eval.codes=both", "eval.codes"),
    ],
)
def test_an_impossible_value_is_refused(override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        validate(load_run(ORACLE, ["train.out=x", override]))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.mask_floor=1.1", "model.mask_floor=1.1: must be at most 1"),
        ("model.mask_floor=-0.1", "model.mask_floor=-0.1: must not be negative"),
        ("model.all_masked=2", "model.all_masked=2.0: must be at most 1"),
        ("model.label_smoothing=1", "model.label_smoothing=1.0: must be below 1"),
        ("eval.steps=0", "eval.steps=0: must be above 0"),
        ("eval.choice_temperature=-1", "eval.choice_temperature=-1.0: must not be negative"),
        ("loss.task_weight=nan", "loss.task_weight=nan: must be finite"),
        ("loss.task_weight=-inf", "loss.task_weight=-inf: must be finite"),
    ],
)
def test_an_impossible_value_of_a_masked_model_is_refused(override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        validate(load_run(LM, ["train.out=x", "oracle=unused", "model.kind=masked", override]))
    assert str(caught.value) == message


def test_samples_may_differ_by_the_order_of_the_steps_alone() -> None:
    keys = ["train.out=x", "oracle=unused", "model.kind=masked", "eval.samples=2", "eval.choice_temperature=1"]
    validate(load_run(LM, [*keys, "eval.steps=2"]))
    with pytest.raises(UserError, match="greedy decoding has only one prediction"):
        validate(load_run(LM, [*keys, "eval.steps=1"]))


def test_values_of_a_masked_model_at_their_limits_are_accepted() -> None:
    for floor, share in ((0, 1), (1, 0)):
        keys = [f"model.mask_floor={floor}", f"model.all_masked={share}", "model.label_smoothing=0", "eval.steps=1"]
        validate(load_run(LM, ["train.out=x", "oracle=unused", "model.kind=masked", *keys]))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.encoder.stages=[]", "model.encoder.stages=[] is empty; name at least one stage, or null"),
        ("model.encoder.frozen=true", "frozen=true with model.encoder.weights=none: a frozen encoder with random"),
        ("model.encoder.image_size=0", "model.encoder.image_size=0: must be above 0"),
        ("model.encoder.out_width=-1", "model.encoder.out_width=-1: must be above 0"),
        ("model.encoder.drop_path=1", "model.encoder.drop_path=1.0: must be below 1"),
        ("model.encoder.drop_path=-0.1", "model.encoder.drop_path=-0.1: must not be negative"),
        ("optim.encoder_layer_decay=1.1", "optim.encoder_layer_decay=1.1: must be at most 1"),
        ("optim.encoder_layer_decay=0", "optim.encoder_layer_decay=0.0: must be above 0"),
    ],
)
@pytest.mark.parametrize("base", [LM, DIRECT], ids=["lm", "direct"])
def test_an_impossible_image_encoder_is_refused(base: dict[str, Any], override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        validate(load_run(base, ["train.out=x", *([] if base is DIRECT else ["oracle=x"]), override]))
    assert message in str(caught.value)


def test_seeds_have_a_range(oracle_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for key in ("train.seed", "eval.seed"):
        validate(load_run(ORACLE, ["train.out=x", f"{key}={2**32 - 1}"]))
        for seed, message in (
            (2**32, f"{key}={2**32}: must be below 2^32"),
            (2**62, f"{key}={2**62}: must be below 2^32"),
            (-1, f"{key}=-1: must not be negative"),
            (2**63, f"{key}={2**63}: must fit in 64 bits"),
            (-(2**64), f"{key}=-{2**64}: must fit in 64 bits"),
        ):
            with pytest.raises(UserError) as caught:
                validate(load_run(ORACLE, ["train.out=x", f"{key}={seed}"]))
            assert message in str(caught.value)
    assert "eval.seed=4611686018427387904: must be below 2^32" in failure(
        capsys, "evaluate", oracle_dir, f"eval.seed={2**62}"
    )
