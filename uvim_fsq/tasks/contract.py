"""Checks that a task implements the `Task` interface correctly: runs one sample through all of its methods.

Each fault is reported in one line. A `UserError` concerns the data and is not a fault of the task.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from uvim_fsq.config.plugins import describe_fault
from uvim_fsq.config.schema import DataConfig
from uvim_fsq.data.batch import to_device
from uvim_fsq.data.sample import Batch, Sample, SampleSource
from uvim_fsq.data.transforms import JointTransform
from uvim_fsq.errors import UserError
from uvim_fsq.tasks.base import Categorical, Metric, Real, Task
from uvim_fsq.tasks.registry import BUILT_IN

#: Label size of the checks.
SIDE = 32
#: Number of samples to try until one can be read.
TRIES = 8


class Fault(Exception):
    """A method returned something that violates the interface."""


def _require(condition: object, message: str) -> None:
    if not condition:
        raise Fault(message)


@dataclass
class _Trial:
    """Collects the faults of a task. Steps that need the result of a failed one are skipped."""

    task: Task
    faults: list[str] = field(default_factory=list[str])

    @contextmanager
    def step(self, method: str) -> Iterator[None]:
        try:
            yield
        except UserError:
            pass
        except Fault as fault:
            self.faults.append(f"task {self.task.name}, {method}: {fault}")
        except Exception as error:
            self.faults.append(f"task {self.task.name}, {method} fails: {describe_fault(error)}")


def contract_faults(task: Task, root: str, split: str = "val") -> list[str]:
    """The faults of the code of `task`, one line each, found with the first readable sample of the split."""
    trial = _Trial(task)
    source = view = labels = items = None
    with trial.step("label_channels"):
        _check_channels(task)
    with trial.step("source"):
        source = task.source(root, split)
        view = _check_sample(task, _readable(source))
    with trial.step("encode"):
        if view is not None and not trial.faults:
            labels = _encode(task, view)
            _check_labels(task, labels)
    if trial.faults or source is None or view is None or labels is None:
        return trial.faults
    logits = _logits(task)
    with trial.step("loss"):
        _check_loss(task, logits, _on_device(labels))
    if task.has_image_loss:
        with trial.step("image_loss"):
            _check_image_loss(task, logits, _on_device(labels))
    with trial.step("decode"):
        decoded = task.decode(logits)
        right = isinstance(decoded, list) and len(decoded) == 2
        _require(right, f"expected a list of one item per image, got {_kind(decoded)}")
        items = decoded
    if items is not None:
        _check_use(trial, source, view, items[0])
    return trial.faults


def refuse_faults(task: Task, root: str, split: str) -> None:
    """Raises UserError for the first fault of a task. Built-in tasks are not checked."""
    faults = [] if task.name in BUILT_IN else contract_faults(task, root, split)
    if faults:
        more = f"; `uvim-fsq data check` lists {len(faults) - 1} more" if len(faults) > 1 else ""
        raise UserError(f"{faults[0]}{more}")


def _readable(source: SampleSource) -> Sample:
    for index in range(min(len(source), TRIES)):
        try:
            return source[index]
        except UserError:
            continue
    raise UserError("no sample can be read")


def _kind(value: object) -> str:
    """A value's type for messages; for arrays and tensors, dtype and shape."""
    if isinstance(value, (np.ndarray, torch.Tensor)):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    return type(value).__name__


def _check_channels(task: Task) -> None:
    channels = task.label_channels
    _require(
        isinstance(channels, Mapping) and channels, f"expected a non-empty dict of channels, got {_kind(channels)}"
    )
    for name, channel in channels.items():
        right = isinstance(channel, Categorical | Real)
        _require(right, f"channel {name!r} is {_kind(channel)}, expected Categorical or Real")
        count = channel.num_classes if isinstance(channel, Categorical) else channel.channels
        _require(isinstance(count, int) and count > 0, f"channel {name!r} has {count} classes or channels")


def _check_sample(task: Task, sample: Sample) -> Sample:
    """Checks image and maps of `sample`; returns its evaluation view."""
    _require(isinstance(sample, Sample), f"expected a Sample, got {_kind(sample)}")
    image = sample.image
    right = isinstance(image, np.ndarray) and image.ndim == 3 and image.shape[2] == 3 and image.dtype == np.uint8
    _require(right, f"the image of a sample is {_kind(image)}, expected uint8 (H, W, 3)")
    for name, values in sample.maps.items():
        right = isinstance(values, np.ndarray) and values.shape[:2] == image.shape[:2]
        _require(right, f"map {name!r} is {_kind(values)}, expected the size of the image {image.shape[:2]}")
        # OpenCV cannot resize other dtypes.
        kinds = ("int32", "float32", "uint8", "int16", "uint16")
        _require(values.dtype.name in kinds, f"map {name!r} is {_kind(values)}, expected int32 or float32")
    for name in task.linear_maps:
        _require(name in sample.maps, f"linear_maps lists {name!r}, but a sample has the maps {sorted(sample.maps)}")
    try:
        return task.evaluation_view(sample)
    except UserError:  # the protocol does not apply to this data
        return sample


def _encode(task: Task, view: Sample) -> dict[str, np.ndarray]:
    transform = JointTransform(DataConfig(image_size=SIDE), task, train=False)
    _, labels = transform.encode(transform.resample(view, 0))
    return labels


def _check_labels(task: Task, labels: object) -> None:
    channels = task.label_channels
    right = isinstance(labels, dict) and labels.keys() == channels.keys()
    names = sorted(labels) if isinstance(labels, dict) else _kind(labels)
    _require(right, f"the channels are {names}, but label_channels has {sorted(channels)}")
    assert isinstance(labels, dict)
    for name, channel in channels.items():
        values = labels[name]
        _require(isinstance(values, np.ndarray), f"channel {name!r} is a {_kind(values)}, expected a NumPy array")
        if isinstance(channel, Categorical):
            right = values.shape == (SIDE, SIDE) and np.issubdtype(values.dtype, np.integer)
            _require(right, f"channel {name!r} is {_kind(values)}, expected integers ({SIDE}, {SIDE})")
            low, high = int(values.min()), int(values.max())
            right, expected = low >= -1 and high < channel.num_classes, f"-1..{channel.num_classes - 1}"
        else:
            right = values.shape == (SIDE, SIDE, channel.channels) and values.dtype in (np.float32, np.uint8)
            shape = f"({SIDE}, {SIDE}, {channel.channels})"
            _require(right, f"channel {name!r} is {_kind(values)}, expected float32 or uint8 {shape}")
            low, high = float(values.min()), float(values.max())
            right, expected = values.dtype == np.uint8 or (low >= -1 and high <= 1), "-1..1"
        _require(right, f"channel {name!r} holds values from {low} to {high}, expected {expected}")


def _logits(task: Task) -> dict[str, torch.Tensor]:
    """Random logits of two images: channel -> (2, SIDE, SIDE, C)."""
    random = torch.Generator().manual_seed(0)
    sizes = {n: c.num_classes if isinstance(c, Categorical) else c.channels for n, c in task.label_channels.items()}
    return {name: torch.randn(2, SIDE, SIDE, size, generator=random) for name, size in sizes.items()}


def _on_device(labels: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """The labels of a batch of two equal images, after `to_device`."""
    tensors = {name: torch.from_numpy(np.stack([values, values])) for name, values in labels.items()}
    batch = Batch(image=torch.zeros(2), labels=tensors, index=torch.arange(2), id=["", ""])
    return to_device(batch, torch.device("cpu"))["labels"]


def _check_loss(task: Task, logits: Mapping[str, torch.Tensor], labels: Mapping[str, torch.Tensor]) -> None:
    flat = {name: x.flatten(1, 2).requires_grad_() for name, x in logits.items()}
    truth = {name: x.flatten(1, 2) for name, x in labels.items()}

    def loss(pixels: slice) -> torch.Tensor:
        result = task.loss({n: x[:, pixels] for n, x in flat.items()}, {n: x[:, pixels] for n, x in truth.items()})
        return _checked_values(result)

    whole, half = loss(slice(None)), SIDE * SIDE // 2
    halves = (loss(slice(half)) + loss(slice(half, None))) / 2
    _require(
        torch.allclose(halves, whole, rtol=1e-3, atol=1e-5),
        "the loss is not a mean over pixels: the loss of all pixels is not the mean of the losses of two halves",
    )
    _check_gradient(whole)


def _check_image_loss(task: Task, logits: Mapping[str, torch.Tensor], labels: Mapping[str, torch.Tensor]) -> None:
    maps = {name: x.detach().requires_grad_() for name, x in logits.items()}
    _check_gradient(_checked_values(task.image_loss(maps, labels)))


def _checked_values(result: Any) -> torch.Tensor:
    """The loss of two images, if `result` is a pair of losses and logs as the contract has it."""
    right = isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Mapping)
    _require(right, f"expected (loss, logs), got {_kind(result)}")
    values, logs = result
    right = isinstance(values, torch.Tensor) and values.shape == (2,) and values.is_floating_point()
    _require(right, f"the loss of 2 images is {_kind(values)}, expected float32 (2,): one value per image")
    for name, value in logs.items():
        right = isinstance(value, torch.Tensor) and value.shape == (2,)
        _require(right, f"log {name!r} of 2 images is {_kind(value)}, expected a tensor (2,)")
    _require(bool(torch.isfinite(values).all()), f"the loss is {values.tolist()} for random logits")
    return values


def _check_gradient(values: torch.Tensor) -> None:
    _require(values.requires_grad, "the loss has no gradient with respect to the logits")
    values.sum().backward()


def _check_use(trial: _Trial, source: SampleSource, view: Sample, item: Any) -> None:
    task = trial.task
    with trial.step("metric"):
        _check_metric(task, task.metric(source), item, view)
    sized = None
    with trial.step("to_size"):
        sized = task.to_size(item, view.image)
    if sized is None:
        return
    with trial.step("render"):
        _check_pictures(task.render(view.image, sized), view.image)
        _check_pictures(task.render(view.image, sized, view), view.image)
    with trial.step("save_prediction"), tempfile.TemporaryDirectory() as folder:
        paths = task.save_prediction(sized, view.image, str(Path(folder) / "stem"))
        right = isinstance(paths, dict) and all(Path(path).is_file() for path in paths.values())
        _require(right and paths, "expected a dict kind -> path of a written file")


def _check_metric(task: Task, metric: Metric, item: Any, view: Sample) -> None:
    row = metric.update(item, view)
    right = isinstance(row, dict) and all(isinstance(value, int | float) for value in row.values())
    _require(right, f"update must return the image's values, name -> float, not {_kind(row)}")
    state = metric.state()
    right = isinstance(state, dict) and all(isinstance(value, np.ndarray) for value in state.values())
    _require(right, "state must return name -> NumPy array")
    figures = metric.compute()
    _require(isinstance(figures, dict), f"compute must return name -> float, not {_kind(figures)}")
    for name in filter(None, (task.main_metric, task.choosing_metric, *task.secondary_metrics)):
        _require(
            name in figures, f"compute returns {', '.join(figures)}, but not {name!r} (main_metric, secondary_metrics)"
        )
    metric.load_state(state)
    _require(_same(metric.compute(), figures), "load_state(state()) changes what compute returns")


def _same(one: Mapping[str, float], two: Mapping[str, float]) -> bool:
    return one.keys() == two.keys() and all(np.isclose(one[key], two[key], equal_nan=True) for key in one)


def _check_pictures(pictures: object, image: np.ndarray) -> None:
    _require(isinstance(pictures, dict) and "prediction" in pictures, 'expected a dict with the title "prediction"')
    assert isinstance(pictures, dict)
    for title, picture in pictures.items():
        right = isinstance(picture, np.ndarray) and picture.shape == image.shape and picture.dtype == np.uint8
        _require(right, f"picture {title!r} is {_kind(picture)}, expected uint8 {image.shape}")
