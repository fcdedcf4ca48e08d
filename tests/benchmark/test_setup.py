"""What the benchmark measures is built from a configuration alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.paths import CONFIGS
from uvim_fsq.benchmark.setup import read_sizes, synthetic_batch
from uvim_fsq.checkpoints.loading import build_task

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["nyu_depth", "coco_panoptic", "imagenet_color"])
def test_models_are_built_without_data_or_an_oracle(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sizes = read_sizes(CONFIGS / name / "lm.yaml")
    assert sizes.lm is not None and sizes.oracle.data.image_size == sizes.lm.data.image_size == 512
    assert sizes.lm.model.encoder.weights == "none"  # the recipe's are downloaded
    task = build_task(sizes.oracle)
    batch = synthetic_batch(task, 24, 3, CPU)
    value, _ = task.loss(
        {k: torch.zeros(3, 24 * 24, getattr(c, "num_classes", 3)) for k, c in task.label_channels.items()},
        {k: x.flatten(1, 2) for k, x in batch["labels"].items()},
    )
    assert torch.isfinite(value).all() and batch["image"].shape == (3, 3, 24, 24)
