"""Training with image encoders other than plain ViTs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests.support.runs import fit_run, last_weights, losses
from tests.support.small import lm_run
from uvim_fsq.checkpoints.loading import load_checkpoint
from uvim_fsq.checkpoints.run_directory import checkpoints
from uvim_fsq.data import published_weights
from uvim_fsq.data.published_weights import create_published
from uvim_fsq.evaluation.results import read_result
from uvim_fsq.training.run import train

#: Removes the overrides of the small configuration.
AS_PUBLISHED = [f"model.encoder.{key}=null" for key in ("patch_size", "width", "depth", "num_heads", "mlp_dim")]


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adafactor", "adamw"])
def test_a_run_with_a_convolutional_encoder_resumes_exactly(tmp_path: Path, oracle_dir: Path, optimizer: str) -> None:
    """With batch norms that learn, stochastic depth, two stages and layer-wise rates."""
    encoder = ["name=test_efficientnet", "image_size=32", "stages=[-1,-2]", "drop_path=0.2"]
    keys = [*AS_PUBLISHED, *(f"model.encoder.{key}" for key in encoder), "optim.encoder_layer_decay=0.8"]
    keys += [f"optim.name={optimizer}", "train.save_every=3"]
    whole = fit_run(lm_run(tmp_path / "whole", oracle_dir, *keys))
    halves = fit_run(lm_run(tmp_path / "halves", oracle_dir, *keys))
    for late in checkpoints(halves)[1:]:
        os.rename(late, tmp_path / f"gone_{late.name}")
    halves = fit_run(lm_run(tmp_path / "halves", oracle_dir, *keys, "train.resume=auto"))
    assert losses(whole) == losses(halves) and len(losses(whole)) == 6
    one, two = last_weights(whole), last_weights(halves)
    assert "encoder.model.bn1.running_mean" in one and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.slow
def test_a_frozen_encoder_leaves_training_as_it_came(
    tmp_path: Path, oracle_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the run contains it, so that the package is not needed to use the run."""
    encoder = ["name=tf_efficientnet_lite0", "weights=package", "frozen=true", "image_size=64", "stages=[2]"]
    run = lm_run(tmp_path / "run", oracle_dir, *AS_PUBLISHED, *(f"model.encoder.{key}" for key in encoder))
    out = train(run)
    package, *_ = create_published("tf_efficientnet_lite0", "package")
    trained, prefix = last_weights(out), "encoder.model."
    theirs = {name: value for name, value in package.state_dict().items() if f"{prefix}{name}" in trained}
    assert len(theirs) > 50 and all(torch.equal(trained[f"{prefix}{name}"], value) for name, value in theirs.items())
    assert not torch.equal(trained["encoder.norms.0.weight"], torch.ones(40))
    monkeypatch.setattr(published_weights, "PACKAGE", "not_installed_anywhere")
    lm = load_checkpoint(out).lm
    assert lm is not None and "rmse" in read_result(out)["figures"]["lm"]
    assert torch.equal(lm.state_dict()["encoder.mean"], torch.full((1, 3, 1, 1), 127 / 255))
