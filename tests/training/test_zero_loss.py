"""Training stops when no pixel has a label."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.support.small import lm_run, oracle_run
from uvim_fsq.errors import UserError
from uvim_fsq.training.run import train


@pytest.mark.slow
@pytest.mark.parametrize("quantizer", ["fsq", "vq"])
@pytest.mark.parametrize("steps", [6, 30])
def test_training_without_any_label_stops_early(
    own_depth_folder: Path, tmp_path: Path, steps: int, quantizer: str
) -> None:
    for file in own_depth_folder.glob("*/depth/*.npy"):
        np.save(file, np.zeros((24, 32), np.float32))
    kind = [] if quantizer == "fsq" else ["model.quantizer.kind=vq", "model.quantizer.codebook_size=16"]
    run = oracle_run(tmp_path / "run", own_depth_folder, f"train.steps={steps}", *kind)
    with pytest.raises(UserError, match=rf"loss of the first {min(steps, 10)} steps is exactly 0: no pixel has a"):
        train(run)


@pytest.mark.slow
def test_training_with_few_labels_continues(own_depth_folder: Path, tmp_path: Path) -> None:
    for file in sorted(own_depth_folder.glob("train/depth/*.npy"))[1:]:
        np.save(file, np.zeros((24, 32), np.float32))
    out = train(oracle_run(tmp_path / "run", own_depth_folder, "train.steps=12"))
    train(lm_run(tmp_path / "lm", out, "train.steps=11"))
