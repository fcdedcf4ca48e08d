"""Fixtures shared by the tests: one small data set and one small pair of trained runs per session."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.small import lm_run, oracle_run, small_data
from uvim_fsq.data.synth_writers import write_dataset
from uvim_fsq.training.run import train

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without a GPU the tests that need one are skipped."""
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


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
