"""What the oracle, its context alone, the LM and the baseline predict."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.evaluation import batch_of
from uvim_fsq.checkpoints.loading import LoadedRun
from uvim_fsq.config.schema import EvalConfig
from uvim_fsq.inference.code_decoding import build_generator
from uvim_fsq.inference.predictions import (
    baseline_predictions,
    context_predictions,
    lm_predictions,
    oracle_predictions,
    predict_functions,
)
from uvim_fsq.lm.autoregressive import AutoregressiveLM
from uvim_fsq.tasks.base import Baseline

CPU = torch.device("cpu")
IMAGES = 6


def equal(one: list[Any], two: list[Any]) -> bool:
    return len(one) == len(two) and all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))


@torch.inference_mode()
def test_predictions_of_oracle_context_and_baseline(random_lm: LoadedRun) -> None:
    task, oracle, batch = random_lm.task, random_lm.oracle, batch_of(random_lm, IMAGES)
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
def test_an_lm_predicts_from_the_image_and_counts_bits_of_the_true_tokens(random_lm: LoadedRun) -> None:
    task, oracle, lm, batch = random_lm.task, random_lm.oracle, random_lm.lm, batch_of(random_lm, IMAGES)
    assert lm is not None
    config = EvalConfig(temperature=1.0, seed=3)
    found = lm_predictions(lm, oracle, task, config)(batch)
    streams = 3 * 1_000_003 + torch.arange(IMAGES)
    tokens = build_generator(lm, config)(batch["image"], streams).tokens
    assert (
        found.tokens is not None
        and torch.equal(found.tokens, tokens)
        and not torch.equal(tokens, build_generator(lm, config)(batch["image"], None).tokens)
    )
    assert equal(found.items, task.decode(oracle.detokenize(tokens, batch["image"])))
    truth = oracle.tokenize(batch["labels"], batch["image"])
    chances = lm.logits(batch["image"], truth).softmax(-1).gather(2, truth[..., None])
    torch.testing.assert_close(found.bits, -chances.log2().sum((1, 2)))


def test_the_generator_follows_the_configuration(random_lm: LoadedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(AutoregressiveLM, "generator", lambda self, sampling, **keys: asked.append((sampling, keys)))
    assert random_lm.lm is not None
    build_generator(
        random_lm.lm, EvalConfig(temperature=0.5, top_k=3, precision="bf16", int8_cross_kv=True, compile=True)
    )
    build_generator(random_lm.lm, EvalConfig(temperature=0.25, top_p=0.5))
    build_generator(random_lm.lm, EvalConfig(codes="soft"))
    (one, keys), (two, plain), (_, soft) = asked
    assert (one.temperature, one.top_k, one.top_p) == (0.5, 3, None)
    assert keys == {"precision": "bf16", "int8_cross_kv": True, "compile": True, "probabilities": False}
    assert (two.temperature, two.top_k, two.top_p) == (0.25, None, 0.5)
    assert plain == {"precision": "fp32", "int8_cross_kv": False, "compile": False, "probabilities": False}
    assert soft["probabilities"]


def test_context_alone_needs_a_decoder_that_sees_the_image(
    random_lm: LoadedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    for context, ways in (("both", ["oracle", "context_only"]), ("decoder", ["oracle", "context_only"])):
        config = replace(random_lm.oracle.config, context=context)
        monkeypatch.setattr(random_lm.oracle, "config", config)
        assert list(predict_functions(random_lm)) == [*ways, "lm"]
        assert list(predict_functions(replace(random_lm, lm=None))) == ways
    for context in ("encoder", "none"):
        monkeypatch.setattr(random_lm.oracle, "config", replace(random_lm.oracle.config, context=context))
        assert list(predict_functions(random_lm)) == ["oracle", "lm"]
