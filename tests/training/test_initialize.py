"""Training that starts from another run's weights (`init_from`)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.support.hub import FakeHub
from tests.support.runs import at, fit_run, last_weights, losses, save_untrained, weights
from tests.support.small import direct_run, lm_run, oracle_run, stage_run
from uvim_fsq.checkpoints.hub import local_run
from uvim_fsq.checkpoints.loading import load_any
from uvim_fsq.checkpoints.run_directory import checkpoints, read_config, weights_hash
from uvim_fsq.config.schema import EncoderConfig
from uvim_fsq.errors import UserError
from uvim_fsq.evaluation.run import evaluate
from uvim_fsq.lm.image_encoder import build_image_encoder
from uvim_fsq.training.initialize import describe, grouped, match
from uvim_fsq.training.stages import build_stage
from uvim_fsq.training.trainer import Trainer

#: Other classes, so another label embedding and another head.
CLASSES = "task.num_bins=8"


def started(run: object) -> dict[str, torch.Tensor]:
    """The weights with which training begins."""
    stage = build_stage(run)  # pyright: ignore[reportArgumentType]
    Trainer(stage, run).resume()  # pyright: ignore[reportArgumentType]
    return stage.model.state_dict()


def equal(state: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> set[str]:
    """The names under which both hold the same."""
    return {name for name, value in state.items() if name in other and torch.equal(value, other[name])}


@pytest.mark.parametrize("stage", ["oracle", "lm", "direct"])
def test_a_run_starts_from_the_weights_of_another(
    tmp_path: Path, data: Path, random_runs: tuple[Path, Path], direct_dir: Path, stage: str
) -> None:
    source = {"oracle": random_runs[0], "lm": random_runs[1], "direct": direct_dir}[stage]
    run = stage_run(stage, tmp_path / "run", data, random_runs[0], f"init_from={source}", "train.seed=7")
    expected = last_weights(source)
    assert equal(started(run), expected) == set(expected)


def test_with_other_classes_the_rest_is_taken_and_the_difference_is_listed(
    tmp_path: Path, data: Path, random_runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    plain = started(oracle_run(tmp_path / "plain", data, CLASSES))
    found = started(oracle_run(tmp_path / "run", data, CLASSES, f"init_from={random_runs[0]}"))
    expected = last_weights(random_runs[0])
    new = {"label_embed.channels.depth.weight", "label_head.heads.depth.weight", "label_head.heads.depth.bias"}
    assert equal(found, expected) == set(expected) - new and new <= equal(found, plain)
    lines = capsys.readouterr().out.splitlines()
    said = [line.strip() for line in lines if "init_from" in line or "another shape" in line]
    assert len(said) == 2 and "% of the parameters, from" in said[0]
    assert "label_embed.channels.depth.weight [256, 16] -> [128, 16]" in said[1]


@pytest.mark.slow
def test_a_direct_run_takes_the_image_encoder_of_an_lm(
    tmp_path: Path, data: Path, random_runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    same = "model.encoder.image_size=16"
    source = fit_run(lm_run(tmp_path / "lm", random_runs[0], "train.steps=1", "optim.warmup_steps=0", same))
    found = started(direct_run(tmp_path / "run", data, f"init_from={source}", same))
    encoder = {name for name in found if name.startswith("encoder.")}
    assert encoder <= equal(found, last_weights(source)) and "of it not used: " in capsys.readouterr().out


@pytest.mark.slow
def test_the_average_of_the_weights_starts_from_them_too(
    tmp_path: Path, data: Path, random_runs: tuple[Path, Path]
) -> None:
    run = oracle_run(tmp_path / "run", data, f"init_from={random_runs[0]}", "train.ema=0.5")
    trainer = Trainer(build_stage(run), run)
    trainer.resume()
    average, expected = trainer.stepper.ema, last_weights(random_runs[0])
    assert average is not None and equal(average, expected) == set(average)


@pytest.mark.slow
def test_a_trained_decoder_is_taken_on_the_same_oracle_only(tmp_path: Path, random_runs: tuple[Path, Path]) -> None:
    trained = ["model.decoder=trained", "loss.task_weight=1"]
    source = save_untrained(lm_run(tmp_path / "source", random_runs[0], *trained))
    expected = last_weights(source)
    decoder = {name for name in expected if name.startswith("label_decoder.")}
    run = lm_run(tmp_path / "run", random_runs[0], *trained, f"init_from={source}")
    assert equal(started(run), expected) == set(expected)
    sums = checkpoints(source)[-1] / "sha256.json"
    sums.write_text(json.dumps({**json.loads(sums.read_text()), "oracle": "0" * 64}))
    found = equal(started(run), expected)
    assert set(expected) - decoder <= found and "label_decoder.label_head.heads.depth.weight" not in found


def test_a_run_starts_from_the_oracle_of_a_downloaded_lm(
    hub: FakeHub, uploads: Path, tmp_path: Path, data: Path
) -> None:
    hub.add_folder("ann/lm", uploads / "lm")
    place = local_run("hub:ann/lm") / "oracle"
    expected = weights(uploads / "lm" / "oracle")
    assert equal(started(oracle_run(tmp_path / "run", data, f"init_from={place}")), expected) == set(expected)


def test_a_run_of_which_nothing_fits_is_refused(tmp_path: Path, data: Path, random_runs: tuple[Path, Path]) -> None:
    other = ["model.width=24", "model.mlp_dim=48", "model.num_heads=2", CLASSES, "model.quantizer.levels=[3,3,3]"]
    run = oracle_run(tmp_path / "run", data, *other, f"init_from={random_runs[0]}")
    with pytest.raises(UserError, match=r"none of its weights fits this model by name and shape"):
        started(run)


@pytest.mark.slow
def test_a_run_that_starts_from_another_resumes_exactly_and_without_it(
    tmp_path: Path, data: Path, random_runs: tuple[Path, Path]
) -> None:
    source = shutil.copytree(random_runs[0], tmp_path / "source")
    settings = [f"init_from={source}", "train.save_every=3", "train.keep=3", "optim.layer_decay=0.5"]
    fit_run(oracle_run(tmp_path / "whole", data, *settings))
    fit_run(oracle_run(tmp_path / "half", data, *settings))
    shutil.rmtree(at(tmp_path / "half", 6))
    shutil.rmtree(source)
    resumed = oracle_run(tmp_path / "half", data, *settings, "train.resume=auto")
    assert resumed.ancestors == read_config(at(tmp_path / "whole", 3)).ancestors
    fit_run(resumed)
    expected = weights(at(tmp_path / "whole", 6))
    assert equal(weights(at(tmp_path / "half", 6)), expected) == set(expected)
    assert losses(tmp_path / "half")[-3:] == losses(tmp_path / "whole")[-3:]


@pytest.mark.slow
def test_configuration_and_results_record_what_a_run_started_from(
    hub: FakeHub, uploads: Path, tmp_path: Path, data: Path
) -> None:
    commit = hub.add_folder("ann/oracle", uploads / "oracle")
    run = oracle_run(tmp_path / "run", data, "init_from=hub:ann/oracle", "train.steps=1", "optim.warmup_steps=0")
    out = fit_run(run)
    (ancestor,) = read_config(checkpoints(out)[-1]).ancestors
    assert (ancestor.run, ancestor.weights) == (f"hub:ann/oracle@{commit}", weights_hash(uploads / "oracle"))
    assert (ancestor.data_root, ancestor.train_split) == ("h5", "train")
    result = evaluate(out, limit=1)
    assert result["ancestors"][0]["run"] == ancestor.run
    with pytest.raises(UserError, match="init_from"):
        load_any(out, ["init_from="])


class Two(nn.Module):
    """An image encoder and a layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = build_image_encoder(EncoderConfig("test_vit"), 32)
        self.head = nn.Linear(2, 2)


def test_the_normalization_of_images_is_taken_with_the_encoders_weights_or_not() -> None:
    model = Two()
    state = model.state_dict()
    assert "encoder.mean" in match(model, state).taken
    other = {name: value for name, value in state.items() if not name.startswith("encoder.model")}
    assert set(match(model, other).taken) == {"head.weight", "head.bias"}


def test_a_frozen_encoder_that_would_stay_random_is_refused(
    tmp_path: Path, data: Path, random_runs: tuple[Path, Path]
) -> None:
    frozen = ["model.encoder.frozen=true", "model.encoder.depth=2", f"init_from={random_runs[1]}"]
    with pytest.raises(UserError, match=r"has no encoder.model.\w+ of this shape, which would stay random"):
        started(lm_run(tmp_path / "run", random_runs[0], *frozen))


def test_names_are_listed_in_a_short_form() -> None:
    names = [f"blocks.{i}.attn.{part}" for i in range(3) for part in ("weight", "bias")]
    assert grouped([*names, "start", "head.weight"]) == ["blocks.*.attn (6 tensors)", "start", "head"]
    found = describe(match(nn.Linear(2, 2), {f"x{i}": torch.zeros(1) for i in range(9)}))
    assert found == ["not in it, so new: weight, bias", "of it not used: x0, x1, x2, x3, x4, x5 and 3 more"]
