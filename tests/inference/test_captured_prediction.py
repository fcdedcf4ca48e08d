"""Whole predictions as captured graphs: equal to the plain path, and when it is used instead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.evaluation import batch_of
from tests.support.fake_graphs import FakeGraph, use_fake_graphs
from uvim_fsq.checkpoints.loading import load_checkpoint, load_direct
from uvim_fsq.inference.code_decoding import LMDecoder
from uvim_fsq.inference.compiled import CapturedPrediction, package_function
from uvim_fsq.inference.predictions import image_decoder, lm_predictions, predict_functions
from uvim_fsq.inference.predictor import Predictor

CPU = torch.device("cpu")
IMAGES = torch.randint(0, 256, (5, 3, 16, 16), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
PICTURES = list(np.random.default_rng(0).integers(0, 255, (5, 20, 30, 3), dtype=np.uint8))
SEEDS = torch.tensor([3, 1, 4, 1, 5])


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[FakeGraph]:
    """The graphs that a test captures, on a CPU."""
    return use_fake_graphs(monkeypatch)


@pytest.mark.parametrize(
    "settings",
    [[], ["eval.samples=3", "eval.temperature=1"], ["eval.codes=soft", "eval.context_weight=0.2"]],
    ids=["greedy", "samples", "mixture"],
)
@torch.inference_mode()
def test_a_replayed_prediction_equals_the_plain_one(
    random_runs: tuple[Path, Path], settings: list[str], graphs: list[FakeGraph]
) -> None:
    loaded = load_checkpoint(random_runs[1], settings)
    assert loaded.lm is not None
    plain, decode = LMDecoder(loaded.lm, loaded.oracle, loaded.task, loaded.run.eval), image_decoder(loaded, CPU)
    assert isinstance(decode, CapturedPrediction)
    # The third batch is padded. Each sample of an image then still has its own random numbers.
    for image, seeds in ((IMAGES, SEEDS), (IMAGES.flip(0), SEEDS + 7), (IMAGES[:3], SEEDS[:3])):
        items, tokens = decode(image, seeds)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("uvim_fsq.lm.captured.captures", lambda device: False)
            expected, expected_tokens = plain(image, seeds)
        np.testing.assert_allclose(items, expected, atol=1e-5)
        assert tokens is not None and torch.equal(tokens, expected_tokens)
    (graph,) = graphs
    assert graph.replays == 3


@torch.inference_mode()
def test_a_direct_model_is_captured_too(direct_dir: Path, graphs: list[FakeGraph]) -> None:
    loaded = load_direct(direct_dir)
    items, tokens = image_decoder(loaded, CPU)(IMAGES, SEEDS)
    (expected,) = loaded.model.iter_logits(IMAGES)
    np.testing.assert_allclose(items, loaded.task.decode(expected), atol=1e-5)
    assert tokens is None and graphs[0].replays == 1


def test_the_predictor_captures_a_prediction(random_runs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = Predictor.from_run(random_runs[1]).predict_batch(PICTURES)
    graphs = use_fake_graphs(monkeypatch)
    found = Predictor.from_run(random_runs[1]).predict_batch(PICTURES)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert [graph.replays for graph in graphs] == [2]  # 4 pictures and 1, which is padded


@torch.inference_mode()
def test_a_batch_whose_label_maps_need_several_parts_takes_the_plain_path(
    random_lm: Any, graphs: list[FakeGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    decode: Any = image_decoder(random_lm, CPU)
    expected, _ = decode(IMAGES, SEEDS)
    monkeypatch.setattr("uvim_fsq.oracle.chunking.MAX_LOGITS", 16 * 16 * 16 * 2)  # S x S x bins of two images
    decode = image_decoder(random_lm, CPU)
    items, _ = decode(IMAGES, SEEDS)
    np.testing.assert_allclose(items, expected, atol=1e-5)
    assert len(graphs) == 2 and graphs[1].replays == 1 and not decode._graphs.graphs  # only the tokens


def test_confidences_are_those_of_the_plain_path(random_lm: Any, graphs: list[FakeGraph]) -> None:
    batch = batch_of(random_lm, 4)
    with torch.inference_mode():
        found = predict_functions(random_lm, confidence=True)["lm"](batch)
        expected = lm_predictions(random_lm.lm, random_lm.oracle, random_lm.task, random_lm.run.eval, confidence=True)(
            batch
        )
    assert found.confidence is not None and expected.confidence is not None
    assert torch.equal(found.confidence, expected.confidence)


def test_a_token_model_of_a_plugin_takes_the_plain_path(random_lm: Any, graphs: list[FakeGraph]) -> None:
    """One whose generator has side effects."""
    plain: Any = LMDecoder(random_lm.lm, random_lm.oracle, random_lm.task, random_lm.run.eval)
    generator = plain.generator
    plain.generator = lambda image, seeds: generator(image, seeds)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("uvim_fsq.inference.predictions.LMDecoder", lambda *_: plain)
        assert image_decoder(random_lm, CPU) is plain


def test_samples_of_a_photo_encode_it_once(
    random_runs: tuple[Path, Path], graphs: list[FakeGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor = Predictor.from_run(random_runs[1], ["eval.temperature=1"])
    decode: Any = predictor._decode
    assert isinstance(decode, CapturedPrediction)
    encode, sizes = decode.plain.generator.model.encode, []
    monkeypatch.setattr(
        decode.plain.generator.model, "encode", lambda images: sizes.append(len(images)) or encode(images)
    )
    predictor.predict_samples(PICTURES[0], 3)
    assert sizes == [1, 1]  # to warm up, and to capture


def test_a_package_that_cannot_be_captured_is_called(graphs: list[FakeGraph]) -> None:
    class Package:
        def boxed_run(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
            return [inputs[0] * int(inputs.pop().sum())]

    with pytest.warns(UserWarning, match="cannot be captured"):
        run = package_function(Package(), [torch.zeros(2)], has_loop=False)
    assert run([torch.tensor([1.0, 3.0])])[0].tolist() == [4, 12]


@pytest.mark.parametrize("has_loop", [False, True])
def test_a_package_is_captured_unless_it_holds_a_loop(has_loop: bool, graphs: list[FakeGraph]) -> None:
    class Package:
        def boxed_run(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
            return [inputs.pop() * 2]

    run = package_function(Package(), [torch.zeros(2)], has_loop=has_loop)
    given = [torch.tensor([1.0, 3.0])]
    assert run(given)[0].tolist() == [2, 6] and run(given)[0].tolist() == [2, 6]
    assert [graph.replays for graph in graphs] == ([] if has_loop else [2])


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [[], ["eval.samples=3", "eval.temperature=1"]], ids=["greedy", "samples"])
def test_a_gpu_gives_the_predictions_of_a_cpu(random_runs: tuple[Path, Path], settings: list[str]) -> None:
    expected = Predictor.from_run(random_runs[1], settings, device="cpu").predict_batch(PICTURES)
    predictor = Predictor.from_run(random_runs[1], settings, device="cuda")
    for count in (5, 3):  # the second batch is padded
        found = predictor.predict_batch(PICTURES[:count])
        np.testing.assert_allclose(found, expected[:count], atol=1e-2)
    decode: Any = predictor._decode
    assert isinstance(decode, CapturedPrediction) and len(decode._graphs.graphs) == 1
