"""Validation of a whole configuration before anything is built. Does not touch files or import torch."""

from __future__ import annotations

import difflib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from uvim_fsq.config.schema import (
    BUILT_IN_QUANTIZERS,
    BUILT_IN_TOKEN_MODELS,
    LEVEL_PRESETS,
    SAMPLING_KEYS,
    DecoderTuningConfig,
    DirectRun,
    EvalConfig,
    LMRun,
    OracleRun,
    Run,
)
from uvim_fsq.errors import UserError


def validate(run: Run, trained: Run | None = None) -> None:
    """Checks value ranges and combinations of settings. Raises UserError for the first problem, with the remedy.

    Args:
        trained: the configuration of a trained model, which `run` equals or overrides. Problems in its training
            settings are ignored, because that training is over.
    """
    ignored = set(_training_problems(trained)) if trained is not None else set[str]()
    for problem in itertools.chain(_training_problems(run), _problems(run)):
        if problem not in ignored:
            raise UserError(problem)


def check_warmup(run: Run, total: int) -> None:
    """Raises UserError if the warm-up is not shorter than the run's `total` steps: the rate would never decay."""
    for problem in _warmup_problems(run, total):
        raise UserError(problem)


def _warmup_problems(run: Run, total: int) -> Iterator[str]:
    if run.optim.warmup_steps >= total:
        epochs = run.train.epochs
        given = f"train.steps={total}" if epochs is None else f"train.epochs={epochs:g}, {total} steps"
        yield f"optim.warmup_steps={run.optim.warmup_steps} must be below {given}"


def check_patches(image_size: int, patch_size: int) -> None:
    """Raises UserError if the patch size does not divide the image side (both in pixels)."""
    if image_size % patch_size:
        raise UserError(f"data.image_size={image_size} is not divisible by model.patch_size={patch_size}")


def check_code_length(code_length: int) -> None:
    """Raises UserError if the code length is not a square number."""
    if math.isqrt(code_length) ** 2 != code_length:
        raise UserError(f"model.code_length={code_length} is not a square number (e.g. 16, 64, 256)")


def check_sampling(
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    steps: int | None = None,
    choice_temperature: float = 0.0,
    *,
    prefix: str = "",
) -> None:
    """Raises UserError for invalid sampling settings; `prefix` is prepended to their names in the message."""
    if temperature < 0:
        raise UserError(f"{prefix}temperature={temperature} is negative; 0 is greedy")
    if top_k is not None and top_p is not None:
        raise UserError(f"{prefix}top_k and {prefix}top_p are mutually exclusive; set one of them")
    if top_k is not None and top_k < 1:
        raise UserError(f"{prefix}top_k={top_k}: keep at least one token")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"{prefix}top_p={top_p}: must be above 0 and at most 1")
    if steps is not None and steps < 1:
        raise UserError(f"{prefix}steps={steps}: decode in at least one step")
    if choice_temperature < 0:
        raise UserError(f"{prefix}choice_temperature={choice_temperature} is negative; 0 takes the most confident")


def refuse_steps(steps: int | None, choice_temperature: float, kind: str) -> None:
    """Raises UserError for settings of decoding in steps, which a token model of this kind does not have."""
    for key, value, default in (("steps", steps, None), ("choice_temperature", choice_temperature, 0.0)):
        if value != default:
            unset = "null" if default is None else f"{default:g}"
            raise UserError(f"eval.{key}={value}: model.kind={kind} does not decode in steps; set it to {unset}")


def is_random(temperature: float, steps: int | None, choice_temperature: float) -> bool:
    """Whether decoding depends on seeds: tokens are drawn, or there is noise in the order in which steps keep them."""
    return temperature > 0 or (choice_temperature > 0 and (steps or 1) > 1)


def check_samples(samples: int, random: bool) -> None:
    """Raises UserError for several samples of greedy decoding, which would all be equal."""
    if samples > 1 and not random:
        raise UserError(
            f"eval.samples={samples} with eval.temperature=0: greedy decoding has only one prediction; "
            "set eval.temperature=1, or eval.samples=1"
        )


def check_context_weight(weight: float, context: str, oracle: str | Path) -> None:
    """Raises UserError if predictions are to be mixed with context alone, but there is none.

    Args:
        weight: `eval.context_weight`.
        context: `model.context` of the oracle.
        oracle: its run or checkpoint directory, for the message.
    """
    if weight > 0 and context in ("none", "encoder"):
        raise UserError(
            f"eval.context_weight={weight}: the decoder of the oracle {oracle} does not see the image "
            f"(model.context={context}), so there is no context alone to mix with; set eval.context_weight=0"
        )


def resolve_levels(levels: Sequence[int] | str, shift: str = "published", prefix: str = "") -> tuple[int, ...]:
    """FSQ's levels per channel, from a sequence or the name of a preset ("2^12").

    Raises UserError for an unknown preset, fewer than 2 levels, 2^31 or more codes, and for shift "centered" with 2
    levels. `prefix` is prepended to the setting names in the message.
    """
    if isinstance(levels, str):
        if levels not in LEVEL_PRESETS:
            raise UserError(f"unknown {prefix}levels preset {levels!r}; presets: {', '.join(LEVEL_PRESETS)}")
        return LEVEL_PRESETS[levels]
    levels = tuple(int(level) for level in levels)
    if not levels or min(levels) < 2:
        raise UserError(f"{prefix}levels={list(levels)}: every channel needs at least 2 levels (5 or more recommended)")
    if math.prod(levels) >= 2**31:
        raise UserError(f"{prefix}levels={list(levels)}: {math.prod(levels)} codes; the product must stay below 2^31")
    if shift == "centered" and 2 in levels:
        raise UserError(f"{prefix}shift=centered is undefined for 2 levels; use published or at least 3 levels")
    return levels


def _problems_of(check: Callable[[], object]) -> Iterator[str]:
    try:
        check()
    except UserError as error:
        yield str(error)


_ABOVE_ZERO = """
    train.epochs train.steps train.batch_size train.accumulate train.log_every train.eval_every train.save_every
    train.keep train.eval_limit eval.batch_size eval.limit eval.samples eval.top_k eval.top_p eval.steps data.image_size
    optim.lr optim.clip_norm model.patch_size model.width model.encoder_depth model.decoder_depth model.depth
    model.num_heads model.mlp_dim model.code_length model.quantizer.codebook_size model.quantizer.codeword_dim
    model.encoder.patch_size model.encoder.width model.encoder.depth
    model.encoder.num_heads model.encoder.mlp_dim model.encoder.image_size model.encoder.out_width
    optim.encoder_layer_decay optim.layer_decay"""
_NOT_NEGATIVE = """
    train.seed eval.seed data.workers eval.workers data.max_bad_samples optim.warmup_steps optim.weight_decay
    optim.final_lr_ratio optim.encoder_lr_ratio eval.temperature eval.choice_temperature eval.code_scale
    eval.context_weight model.dropout model.quantizer.momentum model.quantizer.commitment model.label_smoothing
    model.mask_floor model.all_masked model.encoder.drop_path loss.task_weight decoder_tuning.true_share"""
_AT_MOST_ONE = """
    optim.final_lr_ratio optim.encoder_layer_decay optim.layer_decay eval.top_p eval.context_weight model.mask_floor
    model.all_masked decoder_tuning.true_share"""
_BELOW_ONE = "model.dropout model.quantizer.momentum model.label_smoothing model.encoder.drop_path"
_RULES: tuple[tuple[str, Callable[[float], bool], str], ...] = (
    # In place of math.isfinite, which fails for integers that no float can hold. False for NaN.
    (f"{_ABOVE_ZERO} data.max_pixels {_NOT_NEGATIVE}", lambda value: abs(value) < math.inf, "must be finite"),
    (f"{_ABOVE_ZERO} data.max_pixels", lambda value: value > 0, "must be above 0"),
    (_NOT_NEGATIVE, lambda value: value >= 0, "must not be negative"),
    (_ABOVE_ZERO, lambda value: isinstance(value, float) or value < 2**31, "must be below 2^31"),
    (_AT_MOST_ONE, lambda value: value <= 1, "must be at most 1"),
    ("train.seed eval.seed", lambda value: value < 2**32, "must be below 2^32"),
    (_BELOW_ONE, lambda value: value < 1, "must be below 1"),
)


def _out_of_range(run: Run, sections: tuple[str, ...]) -> Iterator[str]:
    for keys, fits, rule in _RULES:
        for key in keys.split():
            if key.partition(".")[0] not in sections:
                continue
            value: Any = run
            for name in key.split("."):
                value = getattr(value, name, None)  # some keys exist in one stage only
            if value is not None and not fits(value):
                yield f"{key}={value}: {rule}"


def _training_problems(run: Run) -> Iterator[str]:
    train = run.train
    if not train.out:
        yield "train.out is empty; name a run directory, e.g. train.out=runs/my_run"
    if (train.epochs is None) == (train.steps is None):
        yield "give exactly one of train.epochs and train.steps"
    yield from _out_of_range(run, ("train", "optim", "loss", "decoder_tuning"))
    if not all(0 <= beta < 1 for beta in run.optim.betas):
        yield f"optim.betas={list(run.optim.betas)}: both must be at least 0 and below 1"
    if train.steps is not None:
        yield from _warmup_problems(run, train.steps)
    if isinstance(run, LMRun) and run.model.decoder == "trained" and not run.loss.task_weight:
        yield "model.decoder=trained learns from the task loss alone; set loss.task_weight above 0 (e.g. 1.0)"
    if isinstance(run, LMRun) and run.decoder_tuning.run and run.model.decoder != "trained":
        yield "decoder_tuning.run trains a copy of the oracle's decoder; set model.decoder=trained"
    if isinstance(run, LMRun) and run.decoder_tuning.run and run.init_from:
        yield f"init_from={run.init_from} has no effect with decoder_tuning.run, whose weights are kept; remove it"
    if isinstance(run, LMRun) and not run.decoder_tuning.run:
        for key, value in vars(run.decoder_tuning).items():
            if value != getattr(DecoderTuningConfig, key):
                yield (
                    f"decoder_tuning.{key}={value} has no effect without decoder_tuning.run; remove it, or use "
                    "uvim-fsq tune-decoder"
                )
    if train.ema is not None and not 0 < train.ema < 1:
        yield f"train.ema={train.ema}: must be between 0 and 1 (e.g. 0.999), or null"


def _problems(run: Run) -> Iterator[str]:
    """Problems in the data, model and evaluation settings, which matter for a trained run as well."""
    evaluation, model = run.eval, run.model
    yield from _out_of_range(run, ("data", "model", "eval"))
    if not 0 < run.data.crop_area[0] <= run.data.crop_area[1] <= 1:
        yield f"data.crop_area={list(run.data.crop_area)}: must be two increasing fractions of the area in (0, 1]"
    jitter = run.data.color_jitter
    if jitter is not None and not (all(0 <= v < math.inf for v in jitter) and jitter[3] <= 0.5):
        yield f"data.color_jitter={list(jitter)}: all four must be at least 0, and the last, the hue, at most 0.5"
    if isinstance(evaluation, EvalConfig):
        sampling = {key: getattr(evaluation, key) for key in SAMPLING_KEYS}
        yield from _problems_of(lambda: check_sampling(**sampling, prefix="eval."))
        random = is_random(evaluation.temperature, evaluation.steps, evaluation.choice_temperature)
        yield from _problems_of(lambda: check_samples(evaluation.samples, random))
    if model.num_heads < 1 or model.width % model.num_heads:
        yield f"model.width={model.width} is not divisible by model.num_heads={model.num_heads}"
    if isinstance(run, OracleRun):
        yield from _oracle_problems(run)
    elif isinstance(run, DirectRun):
        yield from _encoder_problems(run)
        yield from _problems_of(lambda: check_patches(run.data.image_size, run.model.patch_size))
    else:
        yield from _encoder_problems(run)
        yield from _lm_problems(run)


def _oracle_problems(run: OracleRun) -> Iterator[str]:
    model, size = run.model, run.data.image_size
    yield from _problems_of(lambda: check_patches(size, model.patch_size))
    yield from _problems_of(lambda: check_code_length(model.code_length))
    if model.code_length > (size // model.patch_size) ** 2:
        yield (
            f"model.code_length={model.code_length} exceeds the {(size // model.patch_size) ** 2} patches; "
            "lower it, or the patch size"
        )
    quantizer = model.quantizer
    yield from _unknown_kind("model.quantizer.kind", quantizer.kind, BUILT_IN_QUANTIZERS, run)
    yield from _problems_of(lambda: resolve_levels(quantizer.levels, quantizer.shift, "model.quantizer."))


def _encoder_problems(run: LMRun | DirectRun) -> Iterator[str]:
    encoder = run.model.encoder
    if encoder.stages is not None and not encoder.stages:
        yield "model.encoder.stages=[] is empty; name at least one stage, or null for the last one"
    if encoder.frozen and encoder.weights == "none" and not run.init_from:
        yield (
            "model.encoder.frozen=true with model.encoder.weights=none: a frozen encoder with random weights learns "
            "nothing; give its weights or init_from, or set frozen to false"
        )
    if encoder.frozen and encoder.drop_path:
        yield f"model.encoder.drop_path={encoder.drop_path} has no effect on a frozen encoder; set it to 0"


def _lm_problems(run: LMRun) -> Iterator[str]:
    kind, evaluation = run.model.kind, run.eval
    yield from _unknown_kind("model.kind", kind, BUILT_IN_TOKEN_MODELS, run)
    if run.model.decoder_context == "encoder" and run.model.decoder == "frozen":
        yield "model.decoder_context=encoder: a frozen decoder sees only pixels; set model.decoder=trained"
    if kind == "autoregressive":
        yield from _problems_of(lambda: refuse_steps(evaluation.steps, evaluation.choice_temperature, kind))


def _unknown_kind(key: str, kind: str, known: Sequence[str], run: Run) -> Iterator[str]:
    # Plugins may register others, but they are not imported yet.
    if kind not in known and not run.plugins:
        close = difflib.get_close_matches(kind, known, n=1)
        hint = f"did you mean {close[0]}?" if close else "a custom one must be registered by a module in `plugins`"
        yield f"{key}={kind}: must be one of {', '.join(known)}; {hint}"
