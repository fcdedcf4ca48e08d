"""The masked token model goes through every command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from tests.support.cli import failure
from tests.support.runs import CHANGED, at, last_weights, training_lines
from tests.support.small import LM, ORACLE, lm_run
from uvim_fsq.checkpoints.loading import load_checkpoint
from uvim_fsq.cli import main
from uvim_fsq.config.rules import validate
from uvim_fsq.errors import UserError
from uvim_fsq.inference.predictor import Predictor
from uvim_fsq.lm.masked import MaskedLM
from uvim_fsq.training.stages import build_stage

MASKED = ["model.kind=masked", "model.label_smoothing=0.1", "loss.task_weight=0.5", "eval.steps=2", "eval.codes=soft"]


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("configs")
    for name, tree in (("oracle", ORACLE), ("lm", {**LM, "oracle": "unused"})):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(tree))
    return folder


@pytest.fixture(scope="module")
def masked_dir(configs: Path, oracle_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "masked"
    main(["train-lm", str(configs / "lm.yaml"), f"oracle={oracle_dir}", f"train.out={out}", *MASKED])
    return out


def test_training_logs_the_loss_on_tokens_and_that_of_the_task(masked_dir: Path) -> None:
    assert isinstance(load_checkpoint(masked_dir).lm, MaskedLM)
    lines = training_lines(masked_dir)
    assert len(lines) == 6
    for line in lines:
        assert line["loss"] == pytest.approx(line["token_loss"] + 0.5 * line["task_loss"], rel=1e-5)
        assert 0 <= line["token_accuracy"] <= 1


@pytest.mark.slow
def test_training_goes_on_where_it_stopped(configs: Path, oracle_dir: Path, tmp_path: Path) -> None:
    command = ["train-lm", str(configs / "lm.yaml"), f"oracle={oracle_dir}", *MASKED, "train.save_every=3"]
    main([*command, f"train.out={tmp_path / 'whole'}", "train.keep=9"])
    main([*command, f"train.out={tmp_path / 'again'}", f"train.resume={at(tmp_path / 'whole', 3)}", *CHANGED])
    whole, again = last_weights(tmp_path / "whole"), last_weights(tmp_path / "again")
    assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)


def test_evaluation_does_not_depend_on_the_batch_and_names_the_steps(masked_dir: Path, tmp_path: Path) -> None:
    rows = []
    for batch in (1, 4):
        file, result = tmp_path / f"{batch}.csv", tmp_path / f"{batch}.json"
        settings = ["eval.steps=3", "eval.temperature=1.0", "eval.choice_temperature=2.0", f"eval.batch_size={batch}"]
        main(["evaluate", str(masked_dir), *settings, "--csv", str(file), "--json", str(result)])
        rows.append([line for line in file.read_text().splitlines() if line.startswith("lm,")])
        found = json.loads(result.read_text())
        assert (found["decoding"]["steps"], found["decoding"]["choice_temperature"]) == (3, 2.0)
        assert 0 < found["figures"]["lm"]["bits_per_token"] < 20
    assert rows[0] == rows[1] and len(rows[0]) == 6


def test_predictions_are_made_for_photos(masked_dir: Path, tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(photo)
    main(["predict", str(masked_dir), str(photo), "--out", str(tmp_path / "out")])
    assert "error" not in json.loads((tmp_path / "out" / "predictions.json").read_text())[0]
    assert Predictor.from_run(masked_dir, ["eval.steps=4"]).predict(photo).shape == (20, 30)


@pytest.mark.slow
def test_a_trained_decoder_sees_the_features_of_the_masked_models_encoder(
    configs: Path, oracle_dir: Path, tmp_path: Path
) -> None:
    keys = [*MASKED, "model.decoder=trained", "model.decoder_context=encoder", "optim.warmup_steps=0"]
    main(["train-lm", str(configs / "lm.yaml"), f"oracle={oracle_dir}", f"train.out={tmp_path / 'run'}", *keys])
    decoder = load_checkpoint(tmp_path / "run").lm.label_decoder  # pyright: ignore[reportOptionalMemberAccess]
    assert decoder is not None and decoder.feature_projection is not None
    assert bool(decoder.feature_projection.weight.any())  # zero before training
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["figures"]["lm"]["rmse"] > 0


@pytest.mark.slow
def test_a_run_is_analyzed(masked_dir: Path, tmp_path: Path) -> None:
    main(["analyze", str(masked_dir), "--out", str(tmp_path / "analysis")])
    assert (tmp_path / "analysis" / "analysis.json").is_file()


def test_a_grid_plans_masked_models_beside_autoregressive_ones(
    configs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = {
        "oracle": str(configs / "oracle.yaml"),
        "lm": str(configs / "lm.yaml"),
        "synthetic": {"format": "nyu", "num": 8, "size": 16},
        "rows": {
            "autoregressive": {},
            "parallel": {"lm": {"model.kind": "masked"}},
            "masked": {"lm": {"model.kind": "masked", "eval.steps": 4}},
        },
    }
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid))
    main(["ablate", str(tmp_path / "grid.yaml"), "--dry-run", "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert printed.count("model.kind=masked") == 2 and printed.count("eval.steps=4") == 1


@pytest.mark.slow
@pytest.mark.parametrize("job", ["train-lm", "side-by-side"])
def test_training_is_benchmarked(job: str, configs: Path, data: Path, tmp_path: Path) -> None:
    command = ["benchmark", job, str(configs / "lm.yaml"), f"data.root={data}", *MASKED, "data.workers=1"]
    main([*command, "--batch", "2", "--repeats", "1", "--json", str(tmp_path / "lines.json")])
    lines = json.loads((tmp_path / "lines.json").read_text())["measurements"]
    assert lines and all(line["value"] > 0 for line in lines)


def test_steps_that_the_model_does_not_have_are_refused(
    masked_dir: Path, oracle_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = "eval.steps=5 exceeds the 4 tokens of an image; lower it"
    assert message in failure(capsys, "evaluate", masked_dir, "eval.steps=5")
    with pytest.raises(UserError, match=message):  # before the first training step
        build_stage(lm_run(tmp_path / "new", oracle_dir, "model.kind=masked", "eval.steps=5"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("eval.steps=4", "eval.steps=4: model.kind=autoregressive does not decode in steps; set it to null"),
        ("eval.choice_temperature=1", "eval.choice_temperature=1.0: model.kind=autoregressive does not decode"),
    ],
)
def test_the_autoregressive_model_refuses_steps_before_it_is_built(
    override: str, message: str, oracle_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        validate(lm_run(tmp_path / "new", oracle_dir, override))
