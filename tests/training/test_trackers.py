"""Experiment trackers, with a stand-in for the package of one."""

from __future__ import annotations

import importlib.util
import sys
import typing
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tests.support.runs import fit_run, losses
from tests.support.small import oracle_run
from uvim_fsq.config.schema import TrainConfig
from uvim_fsq.errors import UserError
from uvim_fsq.training.trackers import PACKAGES, build_tracker, check_trackers, tracker_names


class FakeWandb(ModuleType):
    """Records what W&B would get."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = importlib.util.spec_from_loader("wandb", None)
        self.started: dict[str, Any] = {}
        self.settings: dict[str, Any] = {}
        self.lines: list[tuple[int, dict[str, float]]] = []
        self.ended = self.fails = False
        self.config = SimpleNamespace(update=lambda values, **_: self.settings.update(values))

    def init(self, **given: Any) -> FakeWandb:
        self.started = given
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        if self.fails:
            raise ConnectionError("no\nnetwork")
        self.lines.append((step, values))

    def finish(self) -> None:
        self.ended = True


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


@pytest.mark.parametrize(
    "setting", ["train.trackers=[wandb]", "train.wandb=true", "train.trackers=[tensorboard,wandb]"]
)
def test_a_tracker_gets_settings_and_figures(
    setting: str, tmp_path: Path, data: Path, wandb: FakeWandb, quick_evaluation: None
) -> None:
    out = fit_run(oracle_run(tmp_path / "run", data, "train.steps=3", setting))
    assert wandb.started == {"project": "uvim_fsq", "name": "run", "dir": str(out)}
    assert wandb.settings["train.steps"] == 3 and wandb.settings["task.name"] == "nyu_depth"
    assert [values["loss"] for _, values in wandb.lines if "loss" in values] == losses(out)
    assert [step for step, values in wandb.lines if "eval/rmse" in values] == [3] and wandb.ended
    assert list((out / "tensorboard").iterdir()), "TensorBoard is always written"


def test_a_tracker_that_fails_does_not_stop_training(
    tmp_path: Path, data: Path, wandb: FakeWandb, quick_evaluation: None
) -> None:
    wandb.fails = True
    with pytest.warns(UserWarning, match="the tracker wandb failed and gets nothing more: no network") as caught:
        out = fit_run(oracle_run(tmp_path / "run", data, "train.steps=3", "train.trackers=[wandb]"))
    assert len(losses(out)) == 3
    assert len([warning for warning in caught if "tracker" in str(warning.message)]) == 1


def test_a_tracker_that_cannot_start_is_one_line(
    tmp_path: Path, data: Path, wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: Any) -> None:
        raise ValueError("no API key\nlog in first")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(UserError, match=r"wandb cannot start \(no API key log in first\); leave it out"):
        fit_run(oracle_run(tmp_path / "run", data, "train.trackers=[wandb]"))


@pytest.mark.parametrize("name", PACKAGES)
def test_a_missing_package_is_named_with_its_installation(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("uvim_fsq.training.trackers.find_spec", lambda module: None)
    package = name.replace("_", "-")
    with pytest.raises(UserError, match=f"^train.trackers names {name}, which is not installed: pip install {package}"):
        check_trackers(TrainConfig(trackers=("tensorboard", typing.cast(Any, name))))
    check_trackers(TrainConfig())


def test_the_configuration_takes_the_trackers_that_accelerate_knows() -> None:
    from accelerate import tracking

    known = {"tensorboard", *PACKAGES}
    names, _ = typing.get_args(typing.get_type_hints(TrainConfig)["trackers"])
    assert set(typing.get_args(names)) == known <= set(tracking.LOGGER_TYPE_TO_CLASS)


@pytest.mark.parametrize("name", PACKAGES)
def test_runs_are_named_and_their_files_stay_with_the_run(name: str, tmp_path: Path) -> None:
    place = str(tmp_path / "run")
    given = {
        "wandb": {"name": "run", "dir": place},
        "mlflow": {},
        "aim": {"experiment": "uvim_fsq"},
        "comet_ml": {},
        "clearml": {"task_name": "run", "auto_connect_frameworks": False},
        "dvclive": {"dir": f"{place}/dvclive", "resume": True, "save_dvc_exp": False, "dvcyaml": None},
        "swanlab": {"experiment_name": "run", "logdir": f"{place}/swanlog"},
        "trackio": {"name": "run"},
    }
    tracker = build_tracker(name, tmp_path / "run")
    assert tracker.name == name and getattr(tracker, "init_kwargs", {}) == given[name]


def test_a_tracker_named_twice_is_started_once() -> None:
    assert tracker_names(TrainConfig(trackers=("wandb", "wandb", "aim"), wandb=True)) == ("wandb", "aim")
    assert tracker_names(TrainConfig(trackers=())) == ()


def test_an_unknown_tracker_is_refused(tmp_path: Path, data: Path) -> None:
    with pytest.raises(UserError, match=r"train.trackers\[0\].*neptune"):
        oracle_run(tmp_path / "run", data, "train.trackers=[neptune]")
