"""Functions that predict a batch: the oracle, its decoder with dropped codes, the language model, or a baseline.

B batch, L code length, d code channels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from uvim_fsq.checkpoints.loading import LoadedDirect, LoadedRun
from uvim_fsq.config.schema import BasicEvalConfig, EvalConfig
from uvim_fsq.data.sample import Batch
from uvim_fsq.direct.model import DirectModel
from uvim_fsq.inference.code_decoding import LMDecoder, distributions, image_seeds
from uvim_fsq.inference.compiled import CapturedPrediction, Decode, as_one_graph
from uvim_fsq.lm.base import TokenModel
from uvim_fsq.oracle.model import Oracle
from uvim_fsq.tasks.base import Baseline, Task


@dataclass
class Predictions:
    """Predictions of one batch.

    Attributes:
        items: one prediction per image, as returned by `Task.decode`.
        tokens: (B, L) int64, the tokens they were decoded from, with `eval.samples` the first; None if there are none.
        bits: (B,) float32, the cross-entropy of the true tokens under an LM in bits per image; None without an LM.
        truth: (B, L) int64, the oracle's tokens of the true labels; None without an LM.
        confidence: (B, L) float32, the probability that the LM gave each of `tokens` when it was chosen; None unless
            asked for.
    """

    items: list[Any]
    tokens: torch.Tensor | None
    bits: torch.Tensor | None = None
    truth: torch.Tensor | None = None
    confidence: torch.Tensor | None = None


PredictFn = Callable[[Batch], Predictions]


def label_maps(oracle: Oracle, task: Task, codes: torch.Tensor, image: torch.Tensor) -> list[Any]:
    """Decodes codes (B, L, d) and images (B, 3, S, S) to one prediction per image, as returned by `Task.decode`."""
    return [item for logits in oracle.iter_logits(codes, image) for item in task.decode(logits)]


def oracle_predictions(oracle: Oracle, task: Task) -> PredictFn:
    """The oracle alone: labels -> tokens -> labels."""

    def predict(batch: Batch) -> Predictions:
        tokens = oracle.tokenize(batch["labels"], batch["image"])
        codes = oracle.quantizer.indices_to_codes(tokens)
        return Predictions(label_maps(oracle, task, codes, batch["image"]), tokens)

    return predict


def context_predictions(oracle: Oracle, task: Task) -> PredictFn:
    """The oracle's decoder with all codes dropped, which shows how much it predicts from the image alone."""

    def predict(batch: Batch) -> Predictions:
        image = batch["image"]
        return Predictions(label_maps(oracle, task, oracle.empty_codes(len(image)), image), None)

    return predict


def eval_autocast(config: BasicEvalConfig, device: torch.device) -> torch.autocast:
    """The autocast context for predictions, according to `eval.precision`."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")


def lm_predictions(
    lm: TokenModel,
    oracle: Oracle,
    task: Task,
    config: EvalConfig,
    decode: Decode | None = None,
    *,
    confidence: bool = False,
) -> PredictFn:
    """The complete model: the LM predicts tokens from the image and the oracle decodes them, as `LMDecoder` says.

    Each image has its own random stream, seeded by `eval.seed` and its index. `decode` may be a compiled `LMDecoder`.
    With `confidence`, an `LMDecoder` also says how probable its tokens were; a compiled one cannot.
    """
    decode = decode or LMDecoder(lm, oracle, task, config)
    if confidence and isinstance(decode, CapturedPrediction):
        decode = decode.plain
    # With probabilities, whatever the codes are; the tokens are the same.
    asked = LMDecoder(lm, oracle, task, replace(config, codes="soft")) if confidence else None

    def decoded(image: torch.Tensor, seeds: torch.Tensor) -> tuple[list[Any], torch.Tensor | None, torch.Tensor | None]:
        if asked is None or not isinstance(decode, LMDecoder):
            items, tokens = decode(image, seeds)
            return items, tokens, None
        # One sample at a time, except the first, whose tokens are those of the prediction.
        samples = (asked.generate(image, seeds, number) for number in range(config.samples))
        first = next(samples)
        parts, tokens = decode.parts_of(itertools.chain([first], samples), len(image))
        chosen = distributions(first).gather(2, tokens[..., None])[..., 0]
        return decode.decode(parts, image), tokens, chosen

    def predict(batch: Batch) -> Predictions:
        items, tokens, chosen = decoded(batch["image"], image_seeds(config.seed, batch["index"]))
        truth = oracle.tokenize(batch["labels"], batch["image"])
        bits = -lm.log_prob(batch["image"], truth).sum(1) / math.log(2)
        return Predictions(items, tokens, bits, truth, chosen)

    return predict


def direct_label_maps(model: DirectModel, task: Task, image: torch.Tensor) -> list[Any]:
    """One prediction per image (B, 3, S, S), as returned by `Task.decode`."""
    return [item for logits in model.iter_logits(image) for item in task.decode(logits)]


def image_decoder(loaded: LoadedRun | LoadedDirect, device: torch.device) -> Decode:
    """Predicts images without labels, by the checkpoint's compiled packages if there are any that fit.

    Raises UserError for settings that the token model does not support.
    """
    task = loaded.task
    if isinstance(loaded, LoadedDirect):
        return as_one_graph(lambda image, _: (direct_label_maps(loaded.model, task, image), None), loaded, device)
    assert loaded.lm is not None
    return as_one_graph(LMDecoder(loaded.lm, loaded.oracle, task, loaded.run.eval), loaded, device)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def direct_predictions(model: DirectModel, task: Task) -> PredictFn:
    """The direct baseline: image -> labels, without tokens."""
    return lambda batch: Predictions(direct_label_maps(model, task, batch["image"]), None)


def baseline_predictions(baseline: Baseline) -> PredictFn:
    """The task's trivial prediction."""

    def predict(batch: Batch) -> Predictions:
        images = batch["image"].cpu().numpy().transpose(0, 2, 3, 1)
        return Predictions([baseline.predict(image) for image in images], None)

    return predict


def predict_functions(loaded: LoadedRun | LoadedDirect, *, confidence: bool = False) -> dict[str, PredictFn]:
    """Name -> predict function for a checkpoint.

    The names are "oracle"; "context_only" if the oracle's decoder sees the image; and "lm" for an LM's checkpoint. For
    a direct run the only name is "direct". `confidence`: see `lm_predictions`.
    """
    if isinstance(loaded, LoadedDirect):
        decode_direct = image_decoder(loaded, _device(loaded.model))
        return {"direct": lambda batch: Predictions(decode_direct(batch["image"], batch["index"])[0], None)}
    task, oracle = loaded.task, loaded.oracle
    predict_fns: dict[str, PredictFn] = {"oracle": oracle_predictions(oracle, task)}
    if oracle.config.context in ("both", "decoder"):
        predict_fns["context_only"] = context_predictions(oracle, task)
    if loaded.lm is not None:
        decode = image_decoder(loaded, _device(loaded.lm))
        predict_fns["lm"] = lm_predictions(loaded.lm, oracle, task, loaded.run.eval, decode, confidence=confidence)
    return predict_fns
