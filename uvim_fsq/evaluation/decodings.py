"""The effect of how tokens are decoded: an LM's figures with other settings, on the same images."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any

import torch

from uvim_fsq.checkpoints.loading import LoadedDirect, LoadedRun
from uvim_fsq.config.rules import check_context_weight
from uvim_fsq.config.schema import EvalConfig
from uvim_fsq.errors import UserError
from uvim_fsq.evaluation.evaluator import Evaluator
from uvim_fsq.inference.predictions import lm_predictions
from uvim_fsq.lm.base import TokenModel

#: Numbers of steps to try with a model that has them, besides the run's own.
STEPS = (1, 2, 4, 8)


def variants(lm: TokenModel, own: EvalConfig, context: str) -> list[EvalConfig]:
    """The run's own settings, and others that differ from them in one respect each; `context` is the oracle's.

    Tried are hard and soft codes, if the model has steps both with fewer and more of them, greedy decoding, one sample
    and the mean of four, codes closer to the empty one, and a mixture with context alone where the oracle has one.
    """
    other = replace(own, codes="soft" if own.codes == "hard" else "hard")
    found = [own, other]
    if lm.has_steps:
        found += [replace(base, steps=steps) for base in found for steps in STEPS if steps <= lm.length]
    greedy = replace(own, temperature=0.0, choice_temperature=0.0, samples=1)
    sampled = replace(greedy, codes="hard", temperature=1.0)
    found += [greedy, sampled, replace(sampled, samples=4), replace(own, code_scale=0.5)]
    mixed = replace(own, context_weight=0.3)
    with suppress(UserError):
        check_context_weight(mixed.context_weight, context, "of this run")
        found.append(mixed)
    unique: dict[EvalConfig, EvalConfig] = {}
    for setting in found:  # no steps given means one
        unique.setdefault(replace(setting, steps=setting.steps or 1), setting)
    return list(unique.values())


def changes(setting: EvalConfig, own: EvalConfig) -> dict[str, Any]:
    """The keys of `eval` in which a setting differs from the run's own, with their values."""
    return {key: value for key, value in asdict(setting).items() if value != getattr(own, key)}


def refuse_without_lm(loaded: LoadedRun | LoadedDirect) -> LoadedRun:
    """The checkpoint, if it is an LM's. Otherwise raises UserError."""
    if isinstance(loaded, LoadedDirect) or loaded.lm is None:
        raise UserError(f"--decodings is about an LM's tokens, and {loaded.checkpoint} has no LM; leave it out")
    return loaded


def measure_decodings(
    loaded: LoadedRun, evaluator: Evaluator, device: torch.device, own: Mapping[str, float]
) -> list[dict[str, Any]]:
    """`settings` and `figures` of each of `variants`: the changed keys of `eval`, and one evaluation of the LM.

    Settings that the token model does not support are left out.

    Args:
        loaded: an LM's checkpoint, on the device.
        evaluator: of the images.
        device: where the models are.
        own: the figures with the run's own settings, which come first.
    """
    assert loaded.lm is not None
    config, found = loaded.run.eval, list[dict[str, Any]]()
    for setting in variants(loaded.lm, config, loaded.oracle.config.context):
        changed = changes(setting, config)
        figures = own
        if changed:
            try:
                predict = lm_predictions(loaded.lm, loaded.oracle, loaded.task, setting)
            except UserError:
                continue
            evaluator.statistics = None
            figures = evaluator.run(
                predict, device, title=", ".join(f"{key} {value}" for key, value in changed.items())
            )
        found.append({"settings": changed, "figures": dict(figures)})
    return found
