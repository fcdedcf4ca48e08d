"""The prediction as one graph equals the plain path, whatever the decoding settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.token_models import make_images, make_lm, make_masked_lm
from uvim_fsq.checkpoints.loading import load_checkpoint, load_direct
from uvim_fsq.errors import UserError
from uvim_fsq.inference.code_decoding import LMDecoder, iter_mixed_logits
from uvim_fsq.inference.compiled import prediction_graph
from uvim_fsq.inference.one_graph import LMGraph
from uvim_fsq.lm.base import PureGenerator
from uvim_fsq.lm.masked_generator import MaskedGenerator
from uvim_fsq.lm.sampling import Sampling
from uvim_fsq.lm.token_generator import TokenGenerator

SEEDS = torch.tensor([3, 1])
IMAGES = torch.randint(0, 256, (2, 3, 16, 16), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
SETTINGS = {
    "greedy": [],
    "random": ["eval.temperature=1", "eval.top_p=0.7"],
    "mixture": ["eval.codes=soft", "eval.code_scale=0.7", "eval.context_weight=0.2"],
    "samples": ["eval.samples=3", "eval.temperature=1", "eval.top_k=9"],
    "8 bits": ["eval.int8_cross_kv=true"],
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_the_graph_gives_the_logits_and_tokens_of_the_plain_path(
    random_runs: tuple[Path, Path], settings: list[str]
) -> None:
    loaded = load_checkpoint(random_runs[1], settings)
    graph: Any = prediction_graph(loaded)
    assert loaded.lm is not None
    decode = LMDecoder(loaded.lm, loaded.oracle, loaded.task, loaded.run.eval)
    with torch.inference_mode():
        *logits, tokens = graph(IMAGES, graph.draw(SEEDS))
        parts, expected = decode.parts(IMAGES, SEEDS)
        (plain,) = iter_mixed_logits(loaded.task.label_channels, parts, IMAGES)
    assert torch.equal(tokens, expected)
    torch.testing.assert_close(logits, list(plain.values()), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [SETTINGS["samples"], ["eval.precision=bf16"]], ids=["samples", "bf16"])
def test_the_graph_can_be_exported_whole(random_runs: tuple[Path, Path], settings: list[str]) -> None:
    graph: Any = prediction_graph(load_checkpoint(random_runs[1], settings))
    drawn = graph.draw(SEEDS)
    inputs = (IMAGES,) if drawn is None else (IMAGES, drawn)
    with torch.no_grad():
        exported = torch.export.export(graph, inputs).module()
        found, expected = exported(*inputs), graph(*inputs)
    assert torch.equal(found[-1], expected[-1])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_the_direct_model_is_a_graph_too(direct_dir: Path) -> None:
    loaded = load_direct(direct_dir)
    with torch.inference_mode():
        (logits,) = prediction_graph(loaded)(IMAGES)
        (expected,) = loaded.model.iter_logits(IMAGES)
    assert torch.equal(logits, *expected.values())


def test_a_batch_that_needs_chunks_is_refused(random_lm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("uvim_fsq.oracle.chunking.MAX_LOGITS", 16 * 16 * 16 * 2)  # S x S x bins of two images
    graph = prediction_graph(random_lm)
    graph.check_batch(2)
    with pytest.raises(UserError, match="the label maps of so many images"):
        graph.check_batch(10**30)  # at once
    with pytest.raises(UserError, match="--batch 3: the label maps of so many images are too large"):
        graph.check_batch(3)


def test_a_generator_with_side_effects_is_refused(random_lm: Any) -> None:
    decode: Any = LMDecoder(random_lm.lm, random_lm.oracle, random_lm.task, random_lm.run.eval)
    decode.generator = lambda image, seeds: None
    with pytest.raises(UserError, match="token model autoregressive cannot be compiled whole"):
        LMGraph(decode)


@pytest.mark.parametrize("masked", [False, True], ids=["autoregressive", "masked"])
def test_samples_that_are_drawn_together_equal_those_drawn_alone(masked: bool) -> None:
    generator: PureGenerator
    if masked:
        generator = MaskedGenerator(make_masked_lm(), Sampling(1.0, steps=3, choice_temperature=2.0))
    else:
        generator = TokenGenerator(make_lm(), Sampling(1.0))
    images, seeds = make_images(2), (torch.tensor([3, 1]), torch.tensor([4, 9]))
    with torch.inference_mode():
        alone = [generator.predict(images, generator.draw(s)).tokens for s in seeds]
        together = generator.predict(images, generator.draw(torch.cat(seeds)), copies=2).tokens
    assert torch.equal(together, torch.cat(alone)) and not torch.equal(*alone)
