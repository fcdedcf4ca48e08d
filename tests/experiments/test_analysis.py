"""`uvim-fsq analyze`: swapped, zeroed and generated codes, and what its results are called."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.cli import failure
from tests.support.small import oracle_run, small_data
from uvim_fsq.checkpoints.loading import load_checkpoint
from uvim_fsq.cli import main
from uvim_fsq.data.loader import eval_batches
from uvim_fsq.evaluation.run import evaluate
from uvim_fsq.experiments.analysis import (
    analyze_run,
    collect_tokens,
    partners,
    shuffled_lm_predictions,
    shuffled_predictions,
)
from uvim_fsq.experiments.code_pictures import Painter
from uvim_fsq.reports.panels import chosen_samples
from uvim_fsq.training.run import train

CPU = torch.device("cpu")
PICTURES = {"swapped_codes", "usage_oracle", "token_maps", "stitched", "shared_codes", "marginals"}
VQ_KEYS = ("model.quantizer.kind=vq", "model.quantizer.codebook_size=16", "model.quantizer.codeword_dim=8")


def analyzed(run: Path, out: Path, *arguments: str) -> dict[str, Any]:
    main(["analyze", str(run), "--out", str(out), *arguments])
    return json.loads((out / "analysis.json").read_text())


@pytest.mark.parametrize("count", [2, 3, 7, 100])
def test_partners_form_one_cycle(count: int) -> None:
    partner = partners(count, 3)
    assert sorted(partner) == list(range(count)) and not (partner == np.arange(count)).any()
    assert np.array_equal(partner, partners(count, 3))
    assert count < 7 or not np.array_equal(partner, partners(count, 4))


def test_shuffled_predictions_decode_the_partners_tokens(oracle_dir: Path) -> None:
    loaded = load_checkpoint(oracle_dir)
    # Random tokens, because six training steps may not distinguish images.
    tokens = np.random.default_rng(0).integers(25, size=(6, 4))
    batch, _ = chosen_samples(loaded.task, loaded.run.data, 6)
    partner = partners(6, 0)
    with torch.inference_mode():
        got = shuffled_predictions(loaded.oracle, loaded.task, tokens, partner)(batch)
        assert got.tokens is not None and np.array_equal(got.tokens.numpy(), tokens[partner])
        logits = loaded.oracle.detokenize(torch.from_numpy(tokens[partner]), batch["image"])
    for item, expected in zip(got.items, loaded.task.decode(logits), strict=True):
        assert np.array_equal(item, expected)


def test_shuffled_lm_predictions_decode_the_codes_predicted_for_the_partner(lm_dir: Path) -> None:
    loaded = load_checkpoint(lm_dir, ["eval.codes=soft", "eval.code_scale=0.5"])
    assert loaded.lm is not None
    loaded.lm.randomize_head_()
    source = loaded.task.source(loaded.run.data.root, loaded.run.data.eval_split)
    ((batch, _),) = eval_batches(source, loaded.task, loaded.run.data, batch_size=6, workers=0)
    partner = np.array([1, 2, 3, 4, 5, 0])
    predict = shuffled_lm_predictions(loaded, 6, torch.device("cpu"), partner)
    with torch.inference_mode():
        found = predict(batch).items
        probabilities = loaded.lm.generate(batch["image"], probabilities=True).probabilities
        assert probabilities is not None
        codes = 0.5 * loaded.oracle.quantizer.expected_codes(probabilities)
        assert not torch.allclose(codes, codes[partner])
        expected = loaded.task.decode(loaded.oracle.decode(codes[partner], batch["image"]))
    np.testing.assert_allclose(np.stack(found), np.stack(list(expected)), rtol=1e-5)


def test_collected_tokens_do_not_depend_on_the_batch(oracle_dir: Path) -> None:
    few = load_checkpoint(oracle_dir, ["eval.batch_size=4"])
    tokens = collect_tokens(few, None, CPU)
    assert tokens.shape == (6, 4) and np.array_equal(tokens, collect_tokens(load_checkpoint(oracle_dir), None, CPU))
    assert np.array_equal(collect_tokens(few, 3, CPU), tokens[:3])
    # The pictures show the same images, so they have the same tokens.
    assert np.array_equal(Painter(few, CPU).tokens, tokens[np.linspace(0, 5, 5).astype(int)])


@pytest.mark.slow
def test_analysis_of_an_oracle(tmp_path: Path, oracle_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = analyzed(oracle_dir, tmp_path / "a")
    said = capsys.readouterr().out
    assert list(found["figures"]) == list(found["descriptions"]) == ["oracle", "shuffled_codes", "context_only"]
    assert "zero codes equal context alone" in said and "code 12 of the codebook is also zero" in said
    evaluated = evaluate(oracle_dir)
    for way in ("oracle", "context_only"):
        assert found["figures"][way] == evaluated["figures"][way]
    assert found["checkpoint_sha256"] == evaluated["checkpoint_sha256"] and "oracle_sha256" not in found
    assert found["protocol"] == "nyu_depth/full" and found["data"]["split"] == "val" and found["images"] == 6
    assert found["seed"] == 0 and sum(found["code_counts"]["oracle"]) == 24
    assert {file.stem for file in (tmp_path / "a").glob("*.png")} == PICTURES
    page = (tmp_path / "a" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == len(PICTURES) and "src=" not in page.replace('src="data:', "")
    again = analyzed(oracle_dir, tmp_path / "b")
    assert again == found
    for name in PICTURES:
        assert (tmp_path / "a" / f"{name}.png").read_bytes() == (tmp_path / "b" / f"{name}.png").read_bytes(), name


@pytest.mark.slow
def test_analysis_of_an_lm_also_counts_its_tokens(tmp_path: Path, lm_dir: Path, oracle_dir: Path) -> None:
    run = shutil.copytree(lm_dir, tmp_path / "run")
    main(["analyze", str(run), "--limit", "4"])  # into RUN/analysis
    found = json.loads((run / "analysis" / "analysis.json").read_text())
    assert list(found["figures"]) == ["oracle", "shuffled_codes", "context_only", "lm", "lm_shuffled_codes"]
    assert found["images"] == found["limit"] == 4 and "all 4 images" in found["descriptions"]["shuffled_codes"]
    assert sum(found["code_counts"]["lm"]) == sum(found["level_histogram"]["lm"][1]) == 16
    assert found["oracle_sha256"] == evaluate(oracle_dir, limit=2)["checkpoint_sha256"]
    assert found["oracle_sha256"] != found["checkpoint_sha256"]
    assert {file.stem for file in (run / "analysis").glob("*.png")} == PICTURES | {"usage_lm"}


@pytest.mark.slow
def test_analysis_of_a_vq_oracle_without_context(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = train(oracle_run(tmp_path / "run", data, "model.context=none", "model.code_dropout=none", *VQ_KEYS))
    found = analyze_run(run, out=tmp_path / "out")
    assert list(found["figures"]) == ["oracle", "shuffled_codes", "zero_codes"]
    text = found["descriptions"]
    assert "constant" in text["zero_codes"] and "without code dropout" in text["zero_codes"]
    assert "also zero" not in text["zero_codes"] and "own image" not in text["shuffled_codes"]
    assert found["level_histogram"]["oracle"] == [] and len(found["code_counts"]["oracle"]) == 16
    assert {file.stem for file in (tmp_path / "out").glob("*.png")} == PICTURES
    # Without context the image has no influence: one row.
    with Image.open(tmp_path / "out" / "marginals.png") as sheet:
        assert sheet.size[1] < 200
    painter = Painter(load_checkpoint(run), CPU)
    first, second = (painter.oracle.decode(torch.zeros(1, 4, 8), painter.batch["image"][i : i + 1]) for i in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    # Where the photo is the ground truth (colorization), the gray background of decoded codes must not replace it.
    monkeypatch.setattr(painter.task, "render", lambda image, item, truth: {"ground truth": image, "prediction": image})
    truth = painter.truth(1)
    assert truth is not None and np.array_equal(truth, painter.samples[1].image)
    assert (painter.decoded(painter.tokens[1], 1) == 128).all()


@pytest.mark.slow
def test_wrong_arguments_of_analyze_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], oracle_dir: Path
) -> None:
    assert "no such run" in failure(capsys, "analyze", tmp_path / "nowhere")
    assert "contains no checkpoint" in failure(capsys, "analyze", tmp_path)
    assert "unknown key eval.sed" in failure(capsys, "analyze", oracle_dir, "eval.sed=1")
    for limit in ("1", "0", "-2"):
        assert "at least 2" in failure(capsys, "analyze", oracle_dir, "--limit", limit)
    lonely = small_data(tmp_path / "lonely", 2, 1)
    assert "'val' has 1 image" in failure(capsys, "analyze", oracle_dir, f"data.root={lonely}")
    (tmp_path / "file").write_text("")
    assert "cannot write" in failure(capsys, "analyze", oracle_dir, "--out", tmp_path / "file")
    assert not (oracle_dir / "analysis" / "report.html").exists()
