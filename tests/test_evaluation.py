"""Evaluation: what is predicted, what is counted and averaged, and what a result says about itself."""

from __future__ import annotations

import csv
import platform
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import uvim_fsq
from tests.support.small import lm_run, oracle_run
from uvim_fsq.checkpoints.files import file_hash
from uvim_fsq.checkpoints.loading import LoadedRun, load_checkpoint
from uvim_fsq.config.schema import EvalConfig
from uvim_fsq.data.batch import to_device
from uvim_fsq.data.sample import Batch
from uvim_fsq.errors import UserError
from uvim_fsq.evaluation import run as evaluation
from uvim_fsq.evaluation.evaluator import Evaluator
from uvim_fsq.evaluation.run import evaluate, evaluate_loaded
from uvim_fsq.inference.predictions import (
    Predictions,
    baseline_predictions,
    build_generator,
    context_predictions,
    lm_predictions,
    oracle_predictions,
    predict_functions,
)
from uvim_fsq.oracle.quantizers.fsq import FSQ
from uvim_fsq.tasks.base import Baseline, OfficialResults
from uvim_fsq.training.stages import build_stage
from uvim_fsq.training.trainer import Trainer

CPU = torch.device("cpu")
IMAGES = 6


def shake(model: nn.Module) -> None:
    """Random weights everywhere: heads start at zero."""
    torch.manual_seed(1)
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, data: Path) -> tuple[Path, Path]:
    """An oracle's and an LM's run with random weights, saved once, not trained."""
    base = tmp_path_factory.mktemp("runs")
    for name in ("oracle", "lm"):
        out = base / name
        run = oracle_run(out, data) if name == "oracle" else lm_run(out, base / "oracle")
        stage = build_stage(run)
        shake(stage.model)
        out.mkdir()
        Trainer(stage, run).save()
        stage.write_artifacts(out)
    return base / "oracle", base / "lm"


@pytest.fixture
def loaded(runs: tuple[Path, Path]) -> LoadedRun:
    return load_checkpoint(runs[1])


def batch_of(loaded: LoadedRun, count: int = IMAGES) -> Batch:
    """The first images of the evaluation split."""
    config = replace(loaded.run.eval, batch_size=count)
    evaluator = Evaluator(loaded.task, loaded.run.data, config, limit=count)
    given: list[Batch] = []

    def keep(batch: Batch) -> Predictions:
        given.append(batch)
        return Predictions([np.ones((16, 16))] * len(batch["image"]), None)

    evaluator.run(keep, CPU)
    (batch,) = given
    return batch


def equal(one: list[Any], two: list[Any]) -> bool:
    return len(one) == len(two) and all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))


@torch.inference_mode()
def test_what_each_way_predicts(loaded: LoadedRun) -> None:
    task, oracle, batch = loaded.task, loaded.oracle, batch_of(loaded)
    image = batch["image"]
    tokens = oracle.tokenize(batch["labels"], image)
    whole = oracle_predictions(oracle, task)(batch)
    assert whole.tokens is not None and torch.equal(whole.tokens, tokens) and whole.bits is None
    assert equal(whole.items, task.decode(oracle.detokenize(tokens, image)))
    zero = context_predictions(oracle, task)(batch)
    assert zero.tokens is None and zero.bits is None
    assert equal(zero.items, task.decode(oracle.decode(torch.zeros(IMAGES, 4, 2), image)))
    assert not equal(zero.items, whole.items)
    seen = []
    baseline = Baseline("name", lambda x: seen.append(x) or x.mean())
    trivial = baseline_predictions(baseline)(batch)
    assert equal(seen, list(image.permute(0, 2, 3, 1).numpy())) and trivial.tokens is None
    assert trivial.items == [x.mean() for x in seen]


@torch.inference_mode()
def test_an_lm_predicts_from_the_image_and_its_bits_are_those_of_the_true_tokens(loaded: LoadedRun) -> None:
    task, oracle, lm, batch = loaded.task, loaded.oracle, loaded.lm, batch_of(loaded)
    assert lm is not None
    config = EvalConfig(temperature=1.0, seed=3)
    found = lm_predictions(lm, oracle, task, config)(batch)
    streams = 3 * 1_000_003 + torch.arange(IMAGES)
    tokens = build_generator(lm, config)(batch["image"], streams)
    assert (
        found.tokens is not None
        and torch.equal(found.tokens, tokens)
        and not torch.equal(tokens, build_generator(lm, config)(batch["image"]))
    )
    assert equal(found.items, task.decode(oracle.detokenize(tokens, batch["image"])))
    truth = oracle.tokenize(batch["labels"], batch["image"])
    chances = lm(batch["image"], truth).softmax(-1).gather(2, truth[..., None])
    torch.testing.assert_close(found.bits, -chances.log2().sum((1, 2)))


def test_the_decoder_is_the_one_asked_for(loaded: LoadedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(evaluation, "Decoder", lambda lm, sampling, **keys: asked.append((sampling, keys)))
    assert loaded.lm is not None
    build_generator(loaded.lm, EvalConfig(temperature=0.5, top_k=3, precision="bf16", int8_cross_kv=True, compile=True))
    build_generator(loaded.lm, EvalConfig(temperature=0.25, top_p=0.5))
    (one, keys), (two, plain) = asked
    assert (one.temperature, one.top_k, one.top_p) == (0.5, 3, None)
    assert keys == {"precision": "bf16", "int8": True, "compile": True}
    assert (two.temperature, two.top_k, two.top_p) == (0.25, None, 0.5)
    assert plain == {"precision": "fp32", "int8": False, "compile": False}


def test_labels_on_the_device() -> None:
    """Real labels of 8 bits become -1 to 1; classes, real labels that are floating, and the image stay."""
    bytes_, reals = torch.tensor([0, 51, 255]).to(torch.uint8).view(1, 1, 1, 3), torch.rand(1, 1, 1, 3)
    classes = torch.tensor([[[7, 255]]]).to(torch.uint8)
    batch = Batch(
        image=torch.full((1, 3, 2, 2), 9).to(torch.uint8),
        labels={"bytes": bytes_, "reals": reals, "classes": classes},
        index=torch.tensor([4]),
        id=["name"],
    )
    found = to_device(batch, CPU)
    torch.testing.assert_close(found["labels"]["bytes"], torch.tensor([-1.0, -0.6, 1.0]).view(1, 1, 1, 3))
    assert torch.equal(found["labels"]["reals"], reals) and torch.equal(found["labels"]["classes"], classes)
    assert found["labels"]["classes"].dtype == found["image"].dtype == torch.uint8
    assert torch.equal(found["image"], batch["image"]) and found["index"].tolist() == [4] and found["id"] == ["name"]


def constant(bits: list[float] | None = None, tokens: int = 4) -> Any:
    """1 m everywhere; the tokens of image i are all i."""

    def predict(batch: Batch) -> Predictions:
        index = batch["index"]
        cost = torch.tensor(bits)[index] if bits is not None else None
        return Predictions([np.ones((16, 16))] * len(index), index[:, None].expand(-1, tokens), cost)

    return predict


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_figures_are_means_over_all_images(loaded: LoadedRun, batch_size: int) -> None:
    run = loaded.run
    config = replace(run.eval, batch_size=batch_size)
    evaluator = Evaluator(loaded.task, run.data, config, quantizer=loaded.oracle.quantizer)
    assert evaluator.protocol == "" and evaluator.rows == []
    for _ in range(2):  # rows are of the last time
        evaluator.statistics = evaluation.CodeStatistics(loaded.oracle.quantizer)
        figures = evaluator.run(constant([3.0, 5.0, 1.0, 2.0, 4.0, 6.5]), CPU)
        depths = [evaluator.source[i].maps["depth"] for i in range(IMAGES)]
        errors = [np.sqrt(np.mean((d[(d > 1e-3) & (d < 10)] - 1.0) ** 2, dtype=np.float64)) for d in depths]
        assert [row["id"] for row in evaluator.rows] == [evaluator.source[i].id for i in range(IMAGES)]
        assert [row["rmse"] for row in evaluator.rows] == pytest.approx(errors, rel=1e-5)
        assert figures["rmse"] == pytest.approx(np.mean(errors), rel=1e-5) and figures["images"] == IMAGES
        assert figures["bits_per_image"] == pytest.approx(21.5 / 6)
        assert figures["bits_per_token"] == pytest.approx(21.5 / 24)
        assert figures["codebook_usage"] == 6 / 25 and figures["tokens_counted"] == 24
        assert figures["code_perplexity"] == pytest.approx(6)
    assert evaluator.protocol == "nyu_depth/full"
    bare = Evaluator(loaded.task, run.data, config)
    assert bare.statistics is None
    assert not {"bits_per_token", "bits_per_image", "codebook_usage"} & set(bare.run(constant(), CPU))


def test_figures_are_sums_over_processes(loaded: LoadedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of two processes that saw the same images."""
    evaluator = Evaluator(loaded.task, loaded.run.data, loaded.run.eval, quantizer=loaded.oracle.quantizer)
    alone = evaluator.run(constant([3.0, 5.0, 1.0, 2.0, 4.0, 6.5]), CPU)
    monkeypatch.setattr(evaluation.processes, "gather", lambda mine: [mine, mine])
    evaluator = Evaluator(loaded.task, loaded.run.data, loaded.run.eval, quantizer=loaded.oracle.quantizer)
    official = Official()
    together = evaluator.run(constant([3.0, 5.0, 1.0, 2.0, 4.0, 6.5]), CPU, official)
    assert together.pop("official/score") == 0.5 and len(official.finished[0]) == 2 * IMAGES
    assert together == pytest.approx({**alone, "images": 12, "tokens_counted": 48})
    result = evaluate_loaded(loaded, limit=2, device=CPU)
    assert result["images"] == 4 and sum(result["code_counts"]["lm"]) == 2 * 2 * 4


def test_limits(loaded: LoadedRun) -> None:
    """The argument before the key; more than there are is all."""
    data = loaded.run.data
    for given, key, images in ((None, None, 6), (None, 5, 5), (2, 5, 2), (2, None, 2), (99, None, 6)):
        evaluator = Evaluator(loaded.task, data, replace(loaded.run.eval, limit=key), limit=given)
        assert evaluator.limit == (given or key)
        assert evaluator.run(constant(), CPU)["images"] == len(evaluator.rows) == images


def test_predictions_are_made_in_the_precision_asked_for(loaded: LoadedRun) -> None:
    for precision, expected in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        seen = []

        def predict(batch: Batch, seen: list[Any] = seen) -> Predictions:
            seen.append((torch.ones(1, 1) @ torch.ones(1, 1)).dtype)
            assert torch.is_inference_mode_enabled()
            return Predictions([np.ones((16, 16))] * len(batch["image"]), None)

        Evaluator(loaded.task, loaded.run.data, replace(loaded.run.eval, precision=precision)).run(predict, CPU)
        assert set(seen) == {expected}


class Official(OfficialResults):
    def __init__(self, refuses: bool = False) -> None:
        self.refuses, self.finished = refuses, []

    def add(self, prediction: Any, sample: Any) -> Any:
        assert prediction.shape == (16, 16)
        return sample.id

    def finish(self, entries: list[Any]) -> dict[str, float]:
        if self.refuses:
            raise UserError("it is not installed")
        self.finished.append(entries)
        return {"score": 0.5}


def test_official_figures_stand_beside_ours(loaded: LoadedRun) -> None:
    evaluator, official = Evaluator(loaded.task, loaded.run.data, loaded.run.eval), Official()
    figures = evaluator.run(constant(), CPU, official)
    assert figures["official/score"] == 0.5 and official.finished == [[row["id"] for row in evaluator.rows]]
    with pytest.warns(UserWarning, match="no official scores: it is not installed"):
        without = evaluator.run(constant(), CPU, Official(refuses=True))
    del figures["official/score"]
    assert without == figures


def test_ways(loaded: LoadedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Context alone where the decoder sees the image; an LM where there is one."""
    for context, ways in (("both", ["oracle", "context_only"]), ("decoder", ["oracle", "context_only"])):
        config = replace(loaded.oracle.config, context=context)
        monkeypatch.setattr(loaded.oracle, "config", config)
        assert list(predict_functions(loaded)) == [*ways, "lm"]
        assert list(predict_functions(replace(loaded, lm=None))) == ways
    for context in ("encoder", "none"):
        monkeypatch.setattr(loaded.oracle, "config", replace(loaded.oracle.config, context=context))
        assert list(predict_functions(loaded)) == ["oracle", "lm"]


def test_a_result_says_what_it_is(runs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures of every way, counts of codes, each image's own figures, and all that they were obtained with."""
    given = []
    monkeypatch.setattr("uvim_fsq.tasks.nyu_depth.task.NYUDepth.official", lambda self, out, source: given.append(out))
    file = tmp_path / "deep" / "rows.csv"
    keys = ["eval.temperature=0.5", "eval.top_k=4", "eval.seed=9"]
    result = evaluate(runs[1], keys, csv=file, baseline=True, official=tmp_path / "official")
    assert list(result["figures"]) == ["baseline", "oracle", "context_only", "lm"]
    assert given == [tmp_path / "official" / way for way in result["figures"]]
    assert result["baseline"] == "mean depth map of the training set"
    assert (result["images"], result["limit"]) == (IMAGES, None)
    for way, figures in result["figures"].items():
        assert figures["images"] == IMAGES
        assert ("codebook_usage" in figures) == (way in ("oracle", "lm"))
        assert ("bits_per_token" in figures) == (way == "lm")
    loaded = load_checkpoint(runs[1], keys)
    batch = batch_of(loaded)
    assert loaded.lm is not None
    with torch.inference_mode():
        tokens = {
            "oracle": loaded.oracle.tokenize(batch["labels"], batch["image"]),
            "lm": lm_predictions(loaded.lm, loaded.oracle, loaded.task, loaded.run.eval)(batch).tokens,
        }
    quantizer = loaded.oracle.quantizer
    assert isinstance(quantizer, FSQ)
    for way, found in tokens.items():
        assert found is not None
        assert result["code_counts"][way] == torch.bincount(found.flatten(), minlength=25).tolist()
        digits = quantizer.indices_to_digits(found).flatten(0, 1)
        assert result["level_histogram"][way] == [torch.bincount(d, minlength=5).tolist() for d in digits.T]
    assert set(result["code_counts"]) == set(result["level_histogram"]) == {"oracle", "lm"}
    with file.open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    assert [row["way"] for row in rows] == [way for way in result["figures"] for _ in range(IMAGES)]
    for way, figures in result["figures"].items():
        own = [float(row["rmse"]) for row in rows if row["way"] == way]
        assert np.mean(own) == pytest.approx(figures["rmse"])
    decoding = {"temperature": 0.5, "top_k": 4, "top_p": None, "seed": 9, "precision": "fp32", "int8_cross_kv": False}
    assert result["decoding"] == decoding
    assert (result["task"], result["protocol"], result["main_metric"]) == ("nyu_depth", "nyu_depth/full", "rmse")
    assert result["data"]["count"] == IMAGES and result["data"]["image_size"] == 16
    assert result["task_options"]["num_bins"] == 16
    assert result["checkpoint"] == str(loaded.checkpoint)
    assert result["checkpoint_sha256"] == file_hash(loaded.checkpoint / "model.safetensors")
    assert result["versions"] == {
        "uvim_fsq": uvim_fsq.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": "cpu",
    }


def test_an_oracle_alone(runs: tuple[Path, Path], tmp_path: Path) -> None:
    result = evaluate(runs[0], limit=4, report=tmp_path / "page.html")
    assert list(result["figures"]) == ["oracle", "context_only"] and result["baseline"] is None
    assert result["images"] == result["limit"] == result["figures"]["oracle"]["images"] == 4
    assert "nyu_depth/full" in (tmp_path / "page.html").read_text()
    for key, limit, images in (("null", None, 6), ("3", None, 3), ("3", 2, 2)):
        again = evaluate(runs[0], [f"eval.limit={key}"], limit=limit)
        assert again["images"] == images and again["limit"] == (None if images == 6 else images)
    for limit in (0, -1):
        with pytest.raises(UserError, match=f"limit={limit}: "):
            evaluate(runs[0], limit=limit)


def test_the_report_shows_both_stages(runs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Any] = []
    monkeypatch.setattr(evaluation, "write_evaluation", lambda *arguments: written.append(arguments))
    for run, folders in ((runs[0], {"oracle": runs[0]}), (runs[1], {"oracle": runs[0], "lm": runs[1]})):
        result = evaluate(run, limit=1, report=tmp_path / "page.html")
        page, title, loaded, shown, where, device = written.pop()
        assert (page, title, shown, device) == (tmp_path / "page.html", "nyu_depth: nyu_depth/full", result, CPU)
        assert where == folders and loaded.run.data.max_bad_samples == 0
    evaluate(runs[0], limit=1)
    assert not written


def test_rows_of_different_figures_share_a_file(tmp_path: Path) -> None:
    rows = {"a": [{"id": "1", "x": 0.5}, {"id": "2", "y": 2}], "b": []}
    evaluation.write_csv(tmp_path / "rows.csv", rows)
    evaluation.write_csv(tmp_path / "rows.csv", rows)
    assert (tmp_path / "rows.csv").read_text().split() == ["way,id,x,y", "a,1,0.5,", "a,2,,2"]
