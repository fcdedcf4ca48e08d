"""Values that are not finite stop training and are never saved."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.runs import at, fit_run, weights
from tests.support.small import oracle_run
from uvim_fsq.checkpoints.run_directory import checkpoints, step_name
from uvim_fsq.errors import UserError
from uvim_fsq.training import loop
from uvim_fsq.training.progress import Progress
from uvim_fsq.training.stages import OracleStage, build_stage
from uvim_fsq.training.trainer import Trainer


@pytest.mark.parametrize("clip", ["1.0", "null"])
def test_a_gradient_that_is_not_finite_stops_training_before_a_save(
    tmp_path: Path, data: Path, quick_evaluation: None, monkeypatch: pytest.MonkeyPatch, clip: str
) -> None:
    """With a finite loss: the error names the step (from the norm, else the save) and the real last good checkpoint."""
    out = tmp_path / "run"
    original = OracleStage.step
    count = 0

    def step(self: OracleStage, model: torch.nn.Module, batch: Any) -> Any:
        nonlocal count
        count += 1
        loss, logs = original(self, model, batch)
        if count == 4:
            loss.register_hook(lambda grad: grad * math.nan)
        return loss, logs

    monkeypatch.setattr(OracleStage, "step", step)
    keys = ["train.save_every=2", "train.keep=1", "train.log_every=100", f"optim.clip_norm={clip}"]
    wanted = "gradient norm is not finite at step 4" if clip == "1.0" else "not finite after step 4"
    with pytest.raises(UserError, match=f"{wanted}; the last good checkpoint is {at(out, 2)}"):
        fit_run(oracle_run(out, data, *keys))
    assert [p.name for p in checkpoints(out)] == [step_name(2)]
    assert all(bool(value.isfinite().all()) for value in weights(at(out, 2)).values())


@pytest.mark.parametrize("where", ["weights", "average", "optimizer", "buffer"])
def test_a_state_that_is_not_finite_is_never_saved(tmp_path: Path, data: Path, where: str) -> None:
    keys = ["train.ema=0.9", "model.quantizer.kind=vq", "model.quantizer.codebook_size=16"]
    run = oracle_run(tmp_path / "run", data, *keys, "model.quantizer.codeword_dim=8")
    broken = Trainer(build_stage(run), run)
    broken.stepper.optimizer_step(broken.loader.batches(0, 1), lambda seconds: None)
    broken.save()
    assert broken.stepper.ema is not None
    first = next(iter(broken.stage.model.parameters()))
    places: dict[str, torch.Tensor] = {
        "weights": first.data,
        "average": next(iter(broken.stepper.ema.values())),
        "optimizer": broken.stepper.optimizers["model"].state[first]["exp_avg_sq"],
        "buffer": next(x for x in broken.stage.model.buffers() if x.is_floating_point()),
    }
    places[where].view(-1)[-1] = math.inf
    broken.stepper.step += 1
    with pytest.raises(UserError, match=f"not finite after step 2; the last good checkpoint is {at(broken.out, 1)}"):
        broken.save()
    assert [p.name for p in checkpoints(broken.out)] == [step_name(1)]


def test_a_step_that_the_loss_scaler_skips_is_no_error(tmp_path: Path, data: Path) -> None:
    """With fp16 a gradient that is not finite is part of finding the scale; the loss must be finite with it too."""
    run = oracle_run(tmp_path / "run", data)
    trainer = Trainer(build_stage(run), run)
    trainer.out.mkdir()
    progress = Progress(run.train, "oracle", 6, 0, main=True)
    window = [{"loss": torch.tensor(1.0), "grad_norm": torch.tensor(math.inf)}, {"loss": torch.tensor(1.0)}]
    window[1]["grad_norm"] = torch.tensor(1.0)
    trainer.stepper.step = 4
    with pytest.raises(UserError, match="gradient norm is not finite at step 3"):
        loop._log_window(trainer, progress, window)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    loop._log_window(trainer, progress, window)
    window[1]["loss"] = torch.tensor(math.nan)
    with pytest.raises(UserError, match="loss is not finite at step 4; no checkpoint was written yet"):
        loop._log_window(trainer, progress, window)
    progress.close()


def test_large_weights_are_saved(tmp_path: Path, data: Path) -> None:
    """A sum of squares would not be."""
    run = oracle_run(tmp_path / "run", data)
    large = Trainer(build_stage(run), run)
    next(iter(large.stage.model.parameters())).data.fill_(1e30)
    large.stepper.step = 1
    large.save()
    assert [p.name for p in checkpoints(large.out)] == [step_name(1)]
