"""What is refused when a checkpoint is loaded, and how its weights are stored."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from tests.support.runs import save_untrained
from tests.support.small import lm_run, oracle_run
from uvim_fsq.checkpoints.loading import LoadedRun, load_checkpoint
from uvim_fsq.errors import UserError


@pytest.mark.parametrize("context", ["none", "encoder"])
def test_predictions_cannot_be_mixed_with_a_context_that_the_oracle_lacks(
    tmp_path: Path, data: Path, context: str
) -> None:
    oracle = save_untrained(oracle_run(tmp_path / "oracle", data, f"model.context={context}"))
    fault = f"does not see the image .model.context={context}., .*set eval.context_weight=0"
    message = f"eval.context_weight=0.3: the decoder of the oracle .*oracle {fault}"
    with pytest.raises(UserError, match=message):
        lm_run(tmp_path / "lm", oracle, "eval.context_weight=0.3")
    lm = save_untrained(lm_run(tmp_path / "lm", oracle))
    with pytest.raises(UserError, match=message.replace("the oracle .*oracle", f"the oracle {lm / 'oracle'}")):
        load_checkpoint(lm, ["eval.context_weight=0.3"])
    assert load_checkpoint(lm).run.eval.context_weight == 0


def test_loaded_models_read_their_weights_fast(random_lm: LoadedRun) -> None:
    for model in (random_lm.lm, random_lm.oracle):
        assert model is not None
        wide = [x.weight for x in model.modules() if isinstance(x, nn.Linear) and x.out_features > x.in_features]
        assert wide and all(weight.stride(0) == 1 for weight in wide)
