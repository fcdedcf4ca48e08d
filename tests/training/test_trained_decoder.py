"""`model.decoder: trained`: stage II trains a copy of the oracle's decoder, which may see the encoder's features."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.runs import losses
from tests.support.small import TASKS, lm_run, random_batch
from uvim_fsq.checkpoints.loading import load_checkpoint
from uvim_fsq.config.schema import EvalConfig, LMRun
from uvim_fsq.data.sample import Batch
from uvim_fsq.errors import UserError
from uvim_fsq.inference.code_decoding import LMDecoder
from uvim_fsq.training.loop import fit
from uvim_fsq.training.stages import LMStage

TRAINED = ("loss.task_weight=1", "model.decoder=trained")
WITH_FEATURES = (*TRAINED, "model.decoder_context=encoder")


def make_run(out: Path, oracle_dir: Path, *settings: str) -> LMRun:
    run = lm_run(out, oracle_dir, *settings)
    assert isinstance(run, LMRun)
    return run


@pytest.fixture
def batch() -> Batch:
    labels, image = random_batch(TASKS["depth"], 6)
    return Batch(image=image, labels=labels, index=torch.arange(6), id=[str(i) for i in range(6)])


@pytest.mark.parametrize("settings", [TRAINED, WITH_FEATURES])
def test_training_starts_from_the_loss_of_the_frozen_decoder(
    tmp_path: Path, oracle_dir: Path, batch: Batch, settings: tuple[str, ...]
) -> None:
    stages = [LMStage(make_run(tmp_path, oracle_dir, *given)) for given in (("loss.task_weight=1",), settings)]
    frozen, trained = (stage.step(stage.model, batch)[0] for stage in stages)
    torch.testing.assert_close(frozen, trained)


def test_a_step_counts_the_decoder_if_the_task_loss_passes_through_it(tmp_path: Path, oracle_dir: Path) -> None:
    """Forward and backward, and its weights' gradients if they learn."""
    for settings, passes in (((), 0), (("loss.task_weight=1",), 2), (TRAINED, 3)):
        stage = LMStage(make_run(tmp_path, oracle_dir, *settings))
        oracle = stage.oracle.cost()
        assert stage.train_flops() == stage.lm.cost().train + oracle.tokenize + passes * oracle.decode


def test_the_seed_of_the_run_determines_the_first_weights(tmp_path: Path, oracle_dir: Path) -> None:
    found = []
    for number, seed in enumerate((3, 3, 4)):
        torch.manual_seed(number)
        found.append(
            LMStage(make_run(tmp_path, oracle_dir, f"train.seed={seed}")).lm.get_parameter("token_embedding.weight")
        )
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_the_decoder_and_the_image_encoder_learn_from_each_other_s_output(
    tmp_path: Path, oracle_dir: Path, batch: Batch
) -> None:
    stage = LMStage(make_run(tmp_path, oracle_dir, *WITH_FEATURES))
    decoder = stage.lm.label_decoder
    assert decoder is not None and decoder.feature_projection is not None
    stage.step(stage.model, batch)[0].backward()
    gradients = {name: p.grad for name, p in stage.lm.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values())
    assert float(gradients["label_decoder.feature_projection.weight"].abs().max()) > 0
    assert all(p.grad is None for p in stage.oracle.parameters())
    # Once the decoder uses the features, its loss alone also trains the encoder.
    stage.lm.zero_grad()
    torch.nn.init.normal_(decoder.feature_projection.weight)
    features = stage.lm.encode(batch["image"])
    codes = stage.oracle.empty_codes(6)
    value, _ = decoder.label_loss(codes, batch["labels"], batch["image"], stage.task.loss, features=features)
    value.sum().backward()
    assert any(p.grad is not None and p.grad.any() for name, p in stage.lm.named_parameters() if "encoder." in name)


@pytest.mark.slow
def test_a_trained_decoder_is_saved_and_resumed_with_the_token_model(tmp_path: Path, oracle_dir: Path) -> None:
    run = make_run(tmp_path / "whole", oracle_dir, *WITH_FEATURES, "train.save_every=3", "train.accumulate=2")
    stage = LMStage(run)
    fit(stage, run)
    loaded = load_checkpoint(tmp_path / "whole")
    assert loaded.lm is not None and loaded.lm.label_decoder is not None
    torch.testing.assert_close(loaded.lm.label_decoder.state_dict(), stage.lm.label_decoder.state_dict())
    moved = (stage.lm.label_decoder.decoder_stem.weight - stage.oracle.decoder_stem.weight).abs().max()
    assert float(moved) > 0
    checkpoint = tmp_path / "whole" / "checkpoints" / "step_00000003"
    settings = (*WITH_FEATURES, "train.save_every=3", "train.accumulate=2", f"train.resume={checkpoint}")
    again = make_run(tmp_path / "again", oracle_dir, *settings)
    fit(LMStage(again), again)
    assert losses(tmp_path / "again") == losses(tmp_path / "whole")[3:]


@pytest.mark.parametrize("settings", [TRAINED, WITH_FEATURES])
def test_predictions_come_from_the_trained_decoder(
    tmp_path: Path, oracle_dir: Path, batch: Batch, settings: tuple[str, ...]
) -> None:
    stage = LMStage(make_run(tmp_path, oracle_dir, *settings))
    decoder = stage.lm.label_decoder
    assert decoder is not None
    predict = LMDecoder(stage.lm.eval(), stage.oracle, stage.task, EvalConfig(codes="soft"))
    with torch.inference_mode():
        before, _ = predict(batch["image"], torch.arange(6))
        features = stage.lm.encode(batch["image"])
        for p in decoder.parameters():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.3)
        after, _ = predict(batch["image"], torch.arange(6))
        # The untrained token model predicts all codes equally often.
        codes = stage.oracle.quantizer.codebook().mean(0).expand(6, stage.oracle.code_length, -1)
        expected = stage.task.decode(decoder.decode(codes, batch["image"], features))
    assert not np.allclose(before, after)
    np.testing.assert_allclose(np.stack(after), np.stack(list(expected)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        (("model.decoder=trained",), "learns from the task loss alone; set loss.task_weight"),
        (("model.decoder_context=encoder",), "frozen decoder sees only pixels; set model.decoder=trained"),
        (
            ("decoder_tuning.true_share=0.5",),
            "true_share=0.5 has no effect without decoder_tuning.run; remove it, or use",
        ),
        (
            (*WITH_FEATURES, "model.kind=parallel", "plugins=[examples.extensions.extensions]"),
            "parallel has no image features; set it to pixels",
        ),
    ],
)
def test_settings_that_cannot_work_are_one_line(
    tmp_path: Path, oracle_dir: Path, settings: tuple[str, ...], match: str
) -> None:
    with pytest.raises(UserError, match=match):
        LMStage(make_run(tmp_path, oracle_dir, *settings))
