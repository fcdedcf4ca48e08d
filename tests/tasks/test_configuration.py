"""What an LM's configuration inherits from its oracle."""

from __future__ import annotations

import pytest

from tests.support import small
from tests.support.small import ORACLE
from uvim_fsq.config.parse import to_dict
from uvim_fsq.config.schema import LMRun, OracleRun
from uvim_fsq.errors import UserError
from uvim_fsq.tasks.configuration import load_run, resolve_lm


def small_lm(*overrides: str) -> LMRun:
    run = load_run(small.LM, ["oracle=o", "train.out=x", *overrides])
    assert isinstance(run, LMRun)
    return run


def test_an_lm_inherits_only_what_was_not_given() -> None:
    oracle = load_run(
        ORACLE, ["data.root=rooms", "data.hflip=false", "data.crop=none", "data.color_jitter=[0.4,0.4,0.4,0.1]"]
    )
    assert isinstance(oracle, OracleRun)
    run = resolve_lm(small_lm(), oracle)
    assert (run.data.root, run.data.hflip, run.data.crop, run.data.image_size) == ("rooms", False, "none", 16)
    assert run.data.color_jitter == (0.4, 0.4, 0.4, 0.1)
    assert resolve_lm(small_lm("data.color_jitter=null"), oracle).data.color_jitter is None
    # Given values are kept, even if they equal the schema's defaults, and also after a round trip through YAML.
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
