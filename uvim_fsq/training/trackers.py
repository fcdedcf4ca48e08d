"""Experiment trackers by name (Weights & Biases, MLflow, Aim and others), through Accelerate's interface to them.

A tracker never stops a training: one that cannot start is refused before it, and one that fails later is left out from
then on.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from uvim_fsq.config.schema import TrainConfig
from uvim_fsq.errors import UserError

#: The name of the project, or experiment, that runs are filed under.
PROJECT = "uvim_fsq"
#: Tracker -> the module it needs, and the command that installs it. TensorBoard is always written.
PACKAGES = {
    "wandb": ("wandb", "pip install wandb"),
    "mlflow": ("mlflow", "pip install mlflow"),
    "aim": ("aim", "pip install aim"),
    "comet_ml": ("comet_ml", "pip install comet-ml"),
    "clearml": ("clearml", "pip install clearml"),
    "dvclive": ("dvclive", "pip install dvclive"),
    "swanlab": ("swanlab", "pip install swanlab"),
    "trackio": ("trackio", "pip install trackio"),
}


def tracker_names(train: TrainConfig) -> tuple[str, ...]:
    """The trackers besides TensorBoard that `train.trackers` and `train.wandb` name."""
    named = (*train.trackers, *(["wandb"] if train.wandb else []))
    return tuple(dict.fromkeys(name for name in named if name != "tensorboard"))


def check_trackers(train: TrainConfig) -> None:
    """Raises UserError for a tracker whose package is not installed. Imports none of them."""
    for name in tracker_names(train):
        module, install = PACKAGES[name]
        if find_spec(module) is None:
            key = "train.trackers" if name in train.trackers else "train.wandb"
            raise UserError(f"{key} names {name}, which is not installed: {install}, or leave it out")


class Trackers:
    """The started trackers of a run. Made by the main process only.

    Raises UserError for one that is not installed or cannot start, e.g. because nobody is logged in.
    """

    def __init__(self, train: TrainConfig, settings: Mapping[str, Any]) -> None:
        """`settings`: the configuration, flat, which trackers show beside the figures."""
        check_trackers(train)
        self._started: dict[str, Any] = {}
        out = Path(train.out)
        plain = {
            key: value if isinstance(value, (bool, int, float, str)) else str(value) for key, value in settings.items()
        }
        for name in tracker_names(train):
            try:
                tracker = build_tracker(name, out)
                tracker.start()
                if plain:
                    tracker.store_init_configuration(plain)
            except Exception as error:
                reason = " ".join(str(error).split()) or type(error).__name__
                raise UserError(
                    f"the tracker {name} cannot start ({reason}); leave it out of train.trackers"
                ) from error
            self._started[name] = tracker

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Logs the values of a step. A tracker that fails is left out from then on, with a warning."""
        self._each("log", dict(values), step=step)

    def close(self) -> None:
        """Ends the trackers' runs."""
        self._each("finish")

    def _each(self, method: str, *arguments: Any, **named: Any) -> None:
        for name, tracker in list(self._started.items()):
            try:
                getattr(tracker, method)(*arguments, **named)
            except Exception as error:
                reason = " ".join(str(error).split()) or type(error).__name__
                warnings.warn(f"the tracker {name} failed and gets nothing more: {reason}", stacklevel=3)
                del self._started[name]


def build_tracker(name: str, out: Path) -> Any:
    """Accelerate's tracker of a run directory, not started: its package is not imported yet."""
    from accelerate import tracking  # takes a moment

    if name == "wandb":
        return tracking.WandBTracker(PROJECT, name=out.name, dir=str(out))
    if name == "mlflow":
        return tracking.MLflowTracker(PROJECT, run_name=out.name)
    if name == "aim":
        # One repository for all runs of a folder, so that Aim can compare them.
        return tracking.AimTracker(out.name, str(out.parent), experiment=PROJECT)
    if name == "comet_ml":
        return tracking.CometMLTracker(PROJECT)
    if name == "clearml":
        # It would collect the figures a second time from TensorBoard, and upload checkpoints.
        return tracking.ClearMLTracker(PROJECT, task_name=out.name, auto_connect_frameworks=False)
    if name == "dvclive":
        # Without commits and dvc.yaml in the user's repository.
        return tracking.DVCLiveTracker(dir=str(out / "dvclive"), resume=True, save_dvc_exp=False, dvcyaml=None)
    if name == "swanlab":
        return tracking.SwanLabTracker(PROJECT, experiment_name=out.name, logdir=str(out / "swanlog"))
    return tracking.TrackioTracker(PROJECT, name=out.name)
