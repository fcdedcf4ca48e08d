"""Helpers of the benchmark's tests."""

from __future__ import annotations

import importlib
import math
import sys
from types import ModuleType

import pytest
import torch

from tests.support import small
from uvim_fsq.benchmark.setup import Sizes
from uvim_fsq.config.schema import EncoderConfig, LMModelConfig, LMRun, OracleRun
from uvim_fsq.lm.autoregressive import AutoregressiveLM
from uvim_fsq.performance.timing import Measurement
from uvim_fsq.tasks.configuration import load_run, resolve_lm

TINY = LMModelConfig(EncoderConfig("vit_tiny_patch16_224", "none", "gelu_tanh", 4, 16, 1, 2, 32), 16, 1, 2, 32)


def tiny_lm(config: LMModelConfig = TINY) -> AutoregressiveLM:
    torch.manual_seed(0)
    lm = AutoregressiveLM(config, image_size=16, vocab_size=25, length=4).eval()
    torch.nn.init.normal_(lm.head.weight)
    return lm


def without(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Imports of these packages fail as where they are not installed."""
    for name in names:
        for loaded in [m for m in sys.modules if m.split(".")[0] == name]:
            monkeypatch.delitem(sys.modules, loaded)

    real = importlib.import_module

    def refuse(name: str, package: str | None = None) -> ModuleType:
        if name.split(".")[0] in names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name.split(".")[0])
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", refuse)


def by_name(lines: list[Measurement]) -> dict[str, Measurement]:
    names = [line.name for line in lines]
    assert len(set(names)) == len(names), names
    assert all(line.value > 0 and math.isfinite(line.value) for line in lines)
    return dict(zip(names, lines, strict=True))


def small_sizes(*quantizer: str) -> Sizes:
    oracle = load_run(small.ORACLE, ["train.out=unused", *quantizer])
    run = load_run(small.LM, ["train.out=unused", "oracle=none"])
    assert isinstance(run, LMRun) and isinstance(oracle, OracleRun)
    return Sizes(oracle, resolve_lm(run, oracle))
