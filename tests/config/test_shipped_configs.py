"""Every shipped configuration is valid and builds its model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.support.paths import CONFIGS
from uvim_fsq.checkpoints.loading import build_direct, build_oracle, build_task
from uvim_fsq.config.rules import resolve_levels, validate
from uvim_fsq.config.schema import DirectRun, LMRun, OracleRun
from uvim_fsq.lm.autoregressive import AutoregressiveLM
from uvim_fsq.tasks.configuration import load_run

# tests/experiments/ablation covers the grids.
FILES = sorted(file for file in CONFIGS.rglob("*.yaml") if file.parent.name != "ablations")


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=lambda path: str(path.relative_to(path.parents[2])))
def test_a_shipped_configuration_builds_its_model(file: Path) -> None:
    run = load_run(file, ["train.out=runs/x"])
    validate(run)
    first = file.read_text().splitlines()
    assert any(line.startswith("# launch:") for line in first) and any(line.startswith("# expected:") for line in first)
    if not isinstance(run, LMRun) and run.task.name == "coco_panoptic":
        # What `resolve` reads from COCO's annotation file.
        categories = tuple((i, f"class {i}", i <= 80) for i in range(1, 134))
        run = replace(run, task=replace(run.task, options=replace(run.task.options, categories=categories)))
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
            size = 32 if "quickstart" in file.name else 512
            AutoregressiveLM(model, image_size=size, vocab_size=codebook, length=256)


def test_there_are_configurations() -> None:
    assert len(FILES) >= 6
