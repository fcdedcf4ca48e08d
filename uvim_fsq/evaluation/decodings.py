"""The effect of how tokens are decoded: an LM's figures with other settings, on the same images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from uvim_fsq.checkpoints.loading import LoadedDirect, LoadedRun
from uvim_fsq.config.schema import EvalConfig
from uvim_fsq.errors import UserError
from uvim_fsq.evaluation.evaluator import Evaluator
from uvim_fsq.inference.predictions import lm_predictions
from uvim_fsq.lm.base import TokenModel

#: Numbers of steps to try with a model that has them, besides the run's own.
STEPS = (1, 2, 4, 8)


def variants(lm: TokenModel, own: EvalConfig) -> list[EvalConfig]:
    """The run's own settings with hard and soft codes and, if the model has steps, with fewer and more of them.

    The run's own settings come first.
    """
    other = replace(own, codes="soft" if own.codes == "hard" else "hard")
    found = [own, other]
    if lm.has_steps:
        found += [replace(base, steps=steps) for base in found for steps in STEPS if steps <= lm.length]
    # No steps given means one.
    return list({replace(setting, steps=setting.steps or 1): setting for setting in reversed(found)}.values())[::-1]


def refuse_without_lm(loaded: LoadedRun | LoadedDirect) -> LoadedRun:
    """The checkpoint, if it is an LM's. Otherwise raises UserError."""
    if isinstance(loaded, LoadedDirect) or loaded.lm is None:
        raise UserError(f"--decodings is about an LM's tokens, and {loaded.checkpoint} has no LM; leave it out")
    return loaded


def measure_decodings(
    loaded: LoadedRun, evaluator: Evaluator, device: torch.device, own: Mapping[str, float]
) -> list[dict[str, Any]]:
    """`codes`, `steps` and `figures` of each of `variants`, one evaluation of the LM each, except the run's own.

    Args:
        loaded: an LM's checkpoint, on the device.
        evaluator: of the images.
        device: where the models are.
        own: the figures with the run's own settings.
    """
    assert loaded.lm is not None
    config, found = loaded.run.eval, list[dict[str, Any]]()
    for setting in variants(loaded.lm, config):
        figures = own
        if setting != config:
            predict = lm_predictions(loaded.lm, loaded.oracle, loaded.task, setting)
            title = f"codes {setting.codes}" + (f", {setting.steps or 1} steps" if loaded.lm.has_steps else "")
            evaluator.statistics = None
            figures = evaluator.run(predict, device, title=title)
        steps = setting.steps or 1 if loaded.lm.has_steps else None
        found.append({"codes": setting.codes, "steps": steps, "own": setting == config, "figures": dict(figures)})
    return found
