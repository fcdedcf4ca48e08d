"""Fixtures shared by the tests: one small data set and one small pair of trained runs per session."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.hub import FakeHub, serving
from tests.support.runs import save_untrained
from tests.support.small import direct_run, lm_run, oracle_run, small_data
from tests.support.terminal import Clock
from uvim_fsq.checkpoints.loading import LoadedRun, load_checkpoint
from uvim_fsq.config import plugins
from uvim_fsq.config.schema import DataConfig
from uvim_fsq.data.images import limit_pixels
from uvim_fsq.sharing.push import write_folder
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
def direct_dir(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    return train(direct_run(tmp_path_factory.mktemp("runs") / "direct", data))


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


@pytest.fixture
def default_pixel_limit() -> Iterator[None]:
    """The default `data.max_pixels` before and after a test."""
    limit_pixels(DataConfig.max_pixels)
    yield
    limit_pixels(DataConfig.max_pixels)


@pytest.fixture
def own_depth_folder(tmp_path: Path) -> Path:
    """A user's folder of depth data: train/ with 12 pairs, val/ with 4."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 4)):
        for kind in ("images", "depth"):
            (tmp_path / "set" / split / kind).mkdir(parents=True)
        for i in range(count):
            picture = rng.integers(0, 255, (24, 32, 3)).astype(np.uint8)
            Image.fromarray(picture).save(tmp_path / "set" / split / "images" / f"{split}{i}.jpg")
            depth = rng.uniform(1, 5, (24, 32)).astype(np.float32)
            np.save(tmp_path / "set" / split / "depth" / f"{split}{i}.npy", depth)
    return tmp_path / "set"


@pytest.fixture
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own, which does not exist yet."""
    folder = tmp_path_factory.mktemp("cache") / "new"
    monkeypatch.setenv("UVIM_FSQ_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session")
def random_runs(tmp_path_factory: pytest.TempPathFactory, data: Path) -> tuple[Path, Path]:
    """An oracle's and an LM's run with random weights, saved once, not trained."""
    base = tmp_path_factory.mktemp("runs")
    for name in ("oracle", "lm"):
        save_untrained(oracle_run(base / name, data) if name == "oracle" else lm_run(base / name, base / "oracle"))
    return base / "oracle", base / "lm"


@pytest.fixture(scope="session")
def held_out_lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An LM's run with random weights, whose data has a hold-out of 5 images; tests that change it copy it."""
    base = tmp_path_factory.mktemp("held_out")
    data = small_data(base / "data", num=100, layout="png")
    splits = ("data.train_split=train_minus_holdout", "data.selection_split=holdout")
    oracle = save_untrained(oracle_run(base / "oracle", data, *splits))
    return save_untrained(lm_run(base / "lm", oracle))


@pytest.fixture
def random_lm(random_runs: tuple[Path, Path]) -> LoadedRun:
    """The LM of `random_runs`."""
    return load_checkpoint(random_runs[1])


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    """Time that passes only when a test moves it; the process is no rank of a launcher."""
    monkeypatch.delenv("RANK", raising=False)
    yield Clock(monkeypatch)


@pytest.fixture
def no_trusted_plugins(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No plugin is trusted yet; `sys.path` is restored afterwards."""
    monkeypatch.setattr(plugins, "_named", set())
    monkeypatch.delenv("UVIM_FSQ_TRUST", raising=False)
    path = list(sys.path)
    yield
    sys.path[:] = path


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """No graphs compiled by other tests, and none left for them."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> Iterator[FakeHub]:
    """A hub on this machine, which is the only one that the client knows; a new cache and no token."""
    from huggingface_hub import constants

    found = FakeHub()
    with serving(found) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(own_cache / "no_token"))
        monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield found


@pytest.fixture(scope="session")
def uploads(tmp_path_factory: pytest.TempPathFactory, random_runs: tuple[Path, Path]) -> Path:
    """The folders oracle/ and lm/: what `push` would upload of `random_runs`; tests that change them copy them."""
    base = tmp_path_factory.mktemp("uploads")
    for name, run in zip(("oracle", "lm"), random_runs, strict=True):
        write_folder(run, f"ann/{name}", base / name)
    return base
