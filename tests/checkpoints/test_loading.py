"""What is refused when a checkpoint is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.runs import save_untrained
from tests.support.small import lm_run, oracle_run
from uvim_fsq.checkpoints.loading import load_checkpoint
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
