"""The losses of the first steps have not changed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from tests.support.runs import fit_run, losses
from tests.support.small import lm_run, oracle_run

CURVES = Path(__file__).parent / "loss_curves.json"


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["oracle", "lm"])
def test_losses_equal_the_recorded_ones(tmp_path: Path, data: Path, oracle_dir: Path, stage: str) -> None:
    """Twenty steps against recorded losses. UVIM_FSQ_RECORD=1 writes them anew, after a change that is meant."""
    if stage == "oracle":
        run = oracle_run(tmp_path / "run", data, "train.steps=20")
    else:
        run = lm_run(tmp_path / "run", oracle_dir, "train.steps=20")
    curve = losses(fit_run(run))
    recorded = json.loads(CURVES.read_text()) if CURVES.exists() else {}
    if os.environ.get("UVIM_FSQ_RECORD"):
        CURVES.write_text(json.dumps({**recorded, stage: [round(x, 5) for x in curve]}, indent=1) + "\n")
        return
    np.testing.assert_allclose(curve, recorded[stage], atol=5e-3)
    assert curve[-1] < curve[0]
