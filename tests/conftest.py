"""Fixtures shared by the tests: one small data set and one small pair of trained runs per session."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.small import lm_run, oracle_run, small_data
from uvim_fsq.synthetic.writers import write_dataset
from uvim_fsq.training.run import train
from uvim_fsq.training.stages import OracleStage

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests marked `gpu` on machines without one."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no GPU"))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_data(tmp_path_factory.mktemp("data") / "h5")


@pytest.fixture(scope="session")
def oracle_dir(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    return train(oracle_run(tmp_path_factory.mktemp("runs") / "oracle", data))


@pytest.fixture(scope="session")
def lm_dir(tmp_path_factory: pytest.TempPathFactory, oracle_dir: Path) -> Path:
    return train(lm_run(tmp_path_factory.mktemp("runs") / "lm", oracle_dir))


@pytest.fixture(scope="session")
def coco_scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 + 4 rooms of 24 x 32 in the COCO panoptic format; tests that change it copy it."""
    root = tmp_path_factory.mktemp("coco") / "coco"
    write_dataset("coco_panoptic", root, 12, (24, 32), num_val=4, workers=1)
    return root


@pytest.fixture
def quick_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces evaluation and panels by a number that depends erratically on the weights."""

    def evaluate(
        self: OracleStage, model: torch.nn.Module, limit: int | None, device: torch.device
    ) -> dict[str, float]:
        return {"rmse": abs(math.sin(1e5 * sum(float(p.sum()) for p in model.parameters())))}

    def panel(self: OracleStage, model: torch.nn.Module, device: torch.device) -> np.ndarray:
        return np.full((4, 4, 3), int(255 * evaluate(self, model, None, device)["rmse"]), np.uint8)

    monkeypatch.setattr(OracleStage, "evaluate", evaluate)
    monkeypatch.setattr(OracleStage, "panel", panel)
