"""A third quantizer and a second token model, registered from outside, go through every command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from examples.extensions.extensions import Binary, Parallel
from tests.support.small import LM, ORACLE
from uvim_fsq.checkpoints.loading import LoadedRun, load_checkpoint
from uvim_fsq.cli import main
from uvim_fsq.errors import UserError
from uvim_fsq.files import read_json_lines
from uvim_fsq.inference.predictor import Predictor
from uvim_fsq.lm.base import build_token_model
from uvim_fsq.oracle.quantizers.base import build_quantizer, register_quantizer
from uvim_fsq.tasks.configuration import load_run

PLUGINS = "plugins=[examples.extensions.extensions]"
BINARY = ["model.quantizer.kind=binary", "model.quantizer.codeword_dim=5"]


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("configs")
    for name, tree in (("oracle", ORACLE), ("lm", {**LM, "oracle": "unused"})):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(tree))
    return folder


@pytest.fixture(scope="module")
def runs(configs: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An oracle with the binary quantizer and a parallel token model on it, by the two training commands."""
    out = tmp_path_factory.mktemp("runs")
    root = f"data.root={data}"
    main(["train-oracle", str(configs / "oracle.yaml"), root, f"train.out={out / 'oracle'}", PLUGINS, *BINARY])
    lm = ["train-lm", str(configs / "lm.yaml"), f"oracle={out / 'oracle'}", f"train.out={out / 'lm'}", PLUGINS]
    main([*lm, "model.kind=parallel", "optim.name=adafactor", "train.accumulate=2"])
    return out


def loaded(run: Path) -> LoadedRun:
    return load_checkpoint(run, [PLUGINS])


def test_training_uses_the_registered_quantizer_and_token_model(runs: Path) -> None:
    run = loaded(runs / "lm")
    assert isinstance(run.oracle.quantizer, Binary) and run.oracle.quantizer.codebook_size == 32
    assert isinstance(run.lm, Parallel) and run.lm.vocab_size == 32 and run.lm.length == 4
    steps = [line for line in read_json_lines(runs / "oracle" / "metrics.jsonl") if "loss" in line]
    assert len(steps) == 6
    for line in steps:
        assert line["loss"] == pytest.approx(line["reconstruction"] + 0.1 * line["distance"], rel=1e-5)
    assert all("parallel_loss" in line for line in read_json_lines(runs / "lm" / "metrics.jsonl") if "loss" in line)


@pytest.mark.slow
def test_training_goes_on_where_it_stopped(runs: Path, configs: Path, data: Path, tmp_path: Path) -> None:
    command = [
        "train-oracle",
        str(configs / "oracle.yaml"),
        f"data.root={data}",
        PLUGINS,
        *BINARY,
        "train.save_every=3",
    ]
    main([*command, f"train.out={tmp_path / 'whole'}"])
    resumed = f"train.resume={tmp_path / 'whole/checkpoints/step_00000003'}"
    main([*command, f"train.out={tmp_path / 'again'}", resumed])
    whole, again = (loaded(tmp_path / name).oracle.state_dict() for name in ("whole", "again"))
    assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)


@pytest.mark.slow
def test_evaluation_counts_their_codes_and_bits(runs: Path, tmp_path: Path) -> None:
    main(["evaluate", str(runs / "lm"), PLUGINS, "--report", str(tmp_path / "page.html")])
    result = json.loads((runs / "lm" / "evaluation.json").read_text())
    assert len(result["code_counts"]["lm"]) == 32 and result["level_histogram"]["oracle"] == []
    assert 0 < result["figures"]["lm"]["bits_per_token"] < 20
    assert " of 32 codes used" in (tmp_path / "page.html").read_text()


def test_sampling_does_not_depend_on_the_batch(runs: Path, tmp_path: Path) -> None:
    rows = []
    for batch in (1, 4):
        file = tmp_path / f"{batch}.csv"
        settings = ["eval.temperature=1.0", f"eval.batch_size={batch}"]
        main(["evaluate", str(runs / "lm"), PLUGINS, *settings, "--csv", str(file), "--json", str(tmp_path / "r.json")])
        rows.append([line for line in file.read_text().splitlines() if line.startswith("lm,")])
    assert rows[0] == rows[1] and len(rows[0]) == 6


def test_predictions_are_made_for_photos(runs: Path, tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(photo)
    main(["predict", str(runs / "lm"), str(photo), PLUGINS, "--out", str(tmp_path / "out")])
    assert "error" not in json.loads((tmp_path / "out" / "predictions.json").read_text())[0]
    assert Predictor.from_run(runs / "lm", [PLUGINS]).predict(photo).shape == (20, 30)


@pytest.mark.slow
def test_analysis_describes_codes_without_levels(runs: Path, tmp_path: Path) -> None:
    main(["analyze", str(runs / "lm"), PLUGINS, "--out", str(tmp_path / "analysis")])
    assert "codebook is zero" not in (tmp_path / "analysis" / "analysis.json").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("job", ["train-oracle", "train-lm", "decode", "side-by-side"])
def test_they_are_benchmarked(
    job: str, configs: Path, tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = {**ORACLE["model"], "quantizer": {"kind": "binary", "codeword_dim": 5}}
    oracle = {**ORACLE, "model": model, "plugins": ["examples.extensions.extensions"]}
    (tmp_path / "oracle.yaml").write_text(yaml.safe_dump(oracle))
    (tmp_path / "lm.yaml").write_text((configs / "lm.yaml").read_text())
    file = "oracle" if job == "train-oracle" else "lm"
    more = [] if file == "oracle" else ["model.kind=parallel"]
    command = ["benchmark", job, str(tmp_path / f"{file}.yaml"), f"data.root={data}", PLUGINS, *more]
    main([*command, "--batch", "2", "--repeats", "1", "--json", str(tmp_path / "lines.json")])
    lines = json.loads((tmp_path / "lines.json").read_text())["measurements"]
    assert (job == "side-by-side") == (not lines)
    assert all(line["roofline"] is None or line["roofline"] > 0 for line in lines)
    assert not any("8-bit" in line["name"] for line in lines), "the model has no such decoding"


def test_a_grid_plans_them(configs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = {
        "oracle": str(configs / "oracle.yaml"),
        "lm": str(configs / "lm.yaml"),
        "synthetic": {"format": "nyu", "num": 8, "size": 16},
        "set": {
            "oracle": {"plugins": ["examples.extensions.extensions"]},
            "lm": {"plugins": ["examples.extensions.extensions"]},
        },
        "rows": {
            "fsq": {},
            "binary": {"oracle": {"model.quantizer.kind": "binary", "model.quantizer.codeword_dim": 5}},
            "parallel": {"lm": {"model.kind": "parallel"}},
        },
    }
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid))
    main(["ablate", str(tmp_path / "grid.yaml"), "--dry-run", "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "model.quantizer.kind=binary" in printed and "model.kind=parallel" in printed


@pytest.mark.parametrize("key", ["eval.int8_cross_kv", "eval.compile"])
def test_what_a_token_model_does_not_support_is_refused(runs: Path, key: str) -> None:
    with pytest.raises(UserError, match=f"{key}=true: token model Parallel does not support it; set it to false"):
        Predictor.from_run(runs / "lm", [PLUGINS, f"{key}=true"])


@pytest.mark.parametrize(
    ("tree", "override", "message"),
    [
        (ORACLE, "model.quantizer.kind=fsk", "model.quantizer.kind=fsk: must be one of fsq, vq; did you mean fsq?"),
        (LM, "model.kind=masks", "model.kind=masks: must be one of autoregressive, masked; did you mean masked?"),
    ],
)
def test_an_unknown_kind_is_refused_before_anything_is_built(
    tree: dict[str, object], override: str, message: str
) -> None:
    from uvim_fsq.config.rules import validate

    overrides = ["train.out=unused", override, *(["oracle=unused"] if tree is LM else [])]
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        validate(load_run(tree, overrides))


def test_an_unknown_kind_is_refused_where_plugins_might_have_registered_it() -> None:
    oracle = load_run(ORACLE, ["train.out=unused", "model.quantizer.kind=nothing"])
    with pytest.raises(UserError, match="known quantizers are .*fsq.*vq"):
        build_quantizer(oracle.model.quantizer)
    lm = load_run(LM, ["train.out=unused", "oracle=unused", "model.kind=nothing"])
    with pytest.raises(UserError, match="known token models are autoregressive, masked"):
        build_token_model(lm.model, image_size=16, vocab_size=2, length=4)


def test_a_name_belongs_to_one_quantizer() -> None:
    with pytest.raises(ValueError, match="'fsq' is already registered by uvim_fsq.oracle.quantizers.fsq.build_fsq"):
        register_quantizer("fsq")(lambda config: Binary(2))
