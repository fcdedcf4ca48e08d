"""Every shipped configuration is valid and builds its model."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.support.paths import CONFIGS
from uvim_fsq.checkpoints.loading import build_direct, build_oracle, build_task
from uvim_fsq.config.rules import resolve_levels, validate
from uvim_fsq.config.schema import DirectRun, LMModelConfig, LMRun, OracleRun
from uvim_fsq.lm.autoregressive import AutoregressiveLM
from uvim_fsq.tasks.configuration import load_run
from uvim_fsq.tasks.registry import task_class

# tests/experiments/ablation covers the grids.
FILES = sorted(file for file in CONFIGS.rglob("*.yaml") if file.parent.name != "ablations")


@functools.cache
def build_lm(model: LMModelConfig, size: int, codebook: int) -> None:
    """Builds a model once: the configurations of several tasks have the same."""
    AutoregressiveLM(model, image_size=size, vocab_size=codebook, length=256)


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=lambda path: str(path.relative_to(path.parents[2])))
def test_a_shipped_configuration_builds_its_model(file: Path) -> None:
    run = load_run(file, ["train.out=runs/x"])
    validate(run)
    first = file.read_text().splitlines()
    assert any(line.startswith("# launch:") for line in first) and any(line.startswith("# expected:") for line in first)
    if not isinstance(run, LMRun):
        # In place of what `resolve` reads from the data, such as COCO's categories.
        options = task_class(run.task.name).placeholder_config(run.task.options)
        run = replace(run, task=replace(run.task, options=options))
    with torch.device("meta"):
        if isinstance(run, OracleRun):
            build_oracle(run, build_task(run))
        elif isinstance(run, DirectRun):
            build_direct(run, build_task(run), published=False)
        else:
            codebook = 1
            for level in resolve_levels((7, 5, 5, 5, 5)):
                codebook *= level
            model = replace(run.model, encoder=replace(run.model.encoder, weights="none"))
            build_lm(model, 32 if "quickstart" in file.name else 512, codebook)


def test_there_are_configurations() -> None:
    assert len(FILES) >= 6
