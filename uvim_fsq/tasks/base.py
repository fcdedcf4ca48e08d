"""The Task interface: everything that differs between depth, panoptic, colour and your own task.

A task is pure functions over arrays; it knows nothing of models, Accelerate or files outside its own adapter.
Shapes: B batch, P pixels (any number, any order), S label size, H and W native size, C classes or channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from uvim_fsq.data.images import write_png
from uvim_fsq.data.resize import resize_nearest
from uvim_fsq.data.sample import Array, Sample, SampleSource
from uvim_fsq.errors import UserError


@dataclass(frozen=True)
class Categorical:
    """A label channel of class indices 0..num_classes-1; -1 means 'no label' (no input, no loss)."""

    num_classes: int


@dataclass(frozen=True)
class Real:
    """A label channel of `channels` real values per pixel, in [-1, 1]."""

    channels: int


LabelChannel = Categorical | Real


class Metric(ABC):
    """An accumulator whose state is sums and counts, so no figure depends on batch size or process count."""

    #: Named by every result, e.g. "nyu_depth/uvim".
    protocol: str

    @abstractmethod
    def update(self, prediction: Any, sample: Sample) -> dict[str, float]:
        """Adds one image and returns that image's own figures (a row of the per-image CSV).

        Args:
            prediction: one item of `Task.decode`, at the model's label size.
            sample: what `Task.evaluation_view` returned for this image, at native size.
        """

    @abstractmethod
    def state(self) -> dict[str, Array]:
        """The sums and counts as float64 arrays of fixed shapes; states of several processes are added up."""

    @abstractmethod
    def load_state(self, state: Mapping[str, Array]) -> None:
        """Replaces the sums and counts, e.g. by those summed over processes."""

    @abstractmethod
    def compute(self) -> dict[str, float]:
        """The figures over everything seen. Raises UserError if nothing was counted."""


@dataclass(frozen=True)
class Baseline:
    """The trivial prediction that every result stands beside.

    Attributes:
        name: what it is, e.g. "mean depth map of the training set".
        predict: what the models see of an image, (S, S, 3) -> one item as `Task.decode` gives it.
    """

    name: str
    predict: Callable[[Array], Any]


class OfficialResults(ABC):
    """Predictions in the format of a benchmark's own scoring program, and that program's figures."""

    @abstractmethod
    def add(self, prediction: Any, sample: Sample) -> Any:
        """Writes one image's files; arguments as for `Metric.update`. Returns its entry, gathered over processes."""

    @abstractmethod
    def finish(self, entries: list[Any]) -> dict[str, float]:
        """Writes what spans all images and returns the program's figures.

        Raises UserError where it is not installed or refuses; what was written stays.
        """


class Task(ABC):
    """One dense prediction task. Registered with `@register_task`; built as `Task(config)`."""

    #: The registry's name, set by the decorator.
    name: ClassVar[str]
    #: The task's own frozen dataclass; its fields are the keys under `task:` in the YAML, beside `name`. Its tuple
    #: `changeable` names those that may differ once a model is trained: evaluation protocol, decoding, where files lie.
    #: All others define the labels.
    Config: ClassVar[type]
    #: The metric that tables show first and that picks the best checkpoint, and whether smaller is better.
    main_metric: ClassVar[str]
    smaller_is_better: ClassVar[bool] = True
    #: Maps of a Sample that are resampled bilinearly (colour); all others by nearest neighbour.
    linear_maps: ClassVar[tuple[str, ...]] = ()
    #: Figures that tables show beside the main metric.
    secondary_metrics: ClassVar[tuple[str, ...]] = ()
    #: The format of `uvim-fsq synth` that holds this task's data; None if there is none.
    synthetic: ClassVar[str | None] = None

    def __init__(self, config: Any) -> None:
        self.config = config

    @classmethod
    def resolve_config(cls, config: Any, root: str) -> Any:
        """Fills in what only the data under `root` can say (e.g. the categories); kept in the checkpoint.

        Called once, before an oracle's training. Raises UserError when the data are missing.
        """
        return config

    @classmethod
    def placeholder_config(cls, config: Any) -> Any:
        """Stands in for `complete` where no data are at hand and only sizes matter (benchmarks): the standard set's."""
        return config

    @property
    def choosing_metric(self) -> str | None:
        """The metric that picks a run's best checkpoint on a hold-out.

        None where the protocol reports another one: the last checkpoint is used.
        """
        return self.main_metric

    @property
    @abstractmethod
    def label_channels(self) -> dict[str, LabelChannel]:
        """Name -> channel. It alone drives the oracle's input embeddings and heads."""

    @abstractmethod
    def source(self, root: str, split: str) -> SampleSource:
        """Opens the data under `root`. `split` is "train", "val" or a name of the task's own.

        Raises UserError when the root is missing, is of no known layout or is incomplete.
        """

    def model_image(self, sample: Sample) -> Array:
        """What the models may see of a sample: its image unless overridden (colorization: the grey version).

        (H, W, 3) uint8, or float32 already in [-1, 1].
        """
        return sample.image

    def evaluation_view(self, sample: Sample) -> Sample:
        """The part of a sample that evaluation is about (e.g. NYU's crop); the whole sample unless overridden."""
        return sample

    def adjust(self, maps: dict[str, Array], scale: tuple[float, float], *, mirrored: bool) -> dict[str, Array]:
        """Corrects values that mean a direction or a distance in the picture after their pixels were moved; unless
        overridden the maps as they are.

        Called for every sample at the label size, before `encode`. Crop, resize and flip move whole pixels: a normal
        still points to the old left after a flip, and a flow of 10 pixels is still 10 in a picture of half the size.

        Args:
            maps: (S, S) or (S, S, C) arrays; return new ones, do not write into these.
            scale: new pixels per old pixel, downwards and across.
            mirrored: whether left and right were exchanged; always False in evaluation, which neither crops nor flips.
        """
        return maps

    @abstractmethod
    def encode(self, sample: Sample) -> dict[str, Array]:
        """Labels of a sample at the label size, in the form in which they travel to the device.

        A Categorical channel: (S, S) integers of any type, the smaller the faster (see `smallest_integer`); always
        the same one. A Real channel: (S, S, C) float32 in [-1, 1], or uint8, whose 0 to 255 become -1 to 1 on the
        device, before any model or loss sees them.
        """

    @abstractmethod
    def loss(
        self, logits: Mapping[str, torch.Tensor], labels: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Reconstruction loss, a mean over pixels, so that it may be computed on any subset of them.

        Args:
            logits: channel -> (B, P, C) float32.
            labels: channel -> (B, P) integer, or (B, P, C) float32.

        Returns:
            (B,) float32 loss per example, and logs: name -> (B,) device tensors that are averaged like the loss.
        """

    def image_loss(
        self, logits: Mapping[str, torch.Tensor], labels: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """A further loss that needs whole label maps (perceptual, dice, gradients), added to `loss` in stage I.

        Optional: where it is not overridden, no whole maps of logits are made in training.

        Args:
            logits: channel -> (B, S, S, C) float32.
            labels: channel -> (B, S, S) integer, or (B, S, S, C) float32.

        Returns:
            (B,) float32 loss per example, and logs: name -> (B,).
        """
        raise NotImplementedError(f"task {self.name} has no image-level loss")

    @abstractmethod
    def decode(self, logits: Mapping[str, torch.Tensor]) -> list[Any]:
        """One prediction per image from channel -> (B, S, S, C) logits; numpy, on the host, at label size."""

    @abstractmethod
    def metric(self, source: SampleSource) -> Metric:
        """A fresh accumulator of the task's protocol, for the images of `source`."""

    def to_size(self, prediction: Any, image: Array) -> Any:
        """One item of `decode` brought to the size of `image` (H, W, 3); an array by nearest neighbour."""
        return resize_nearest(prediction, (image.shape[0], image.shape[1]))

    @abstractmethod
    def render(self, image: Array, prediction: Any, truth: Sample | None = None) -> dict[str, Array]:
        """Pictures for reports: an ordered dict title -> (H, W, 3) uint8, "prediction" and, with `truth`, the titles
        "ground truth" and perhaps "error".

        Args:
            image: (H, W, 3) uint8.
            prediction: one item of `decode` at the size of `image`.
            truth: the sample that `image` belongs to, or None.
        """

    def prediction_files(self, stem: str) -> dict[str, str]:
        """Kind -> path of the files that `save_prediction` will write, so that no two pictures claim one file.

        To be overridden together with it. Other files it writes are refused where they would replace something.
        """
        return {"prediction": f"{stem}_prediction.png"}

    def save_prediction(self, prediction: Any, image: Array, stem: str) -> dict[str, str]:
        """Writes one prediction, at the size of `image` (H, W, 3), as `stem`*; returns kind -> path.

        Unless overridden: the pictures of `render`. Raises UserError where they cannot be written.
        """
        paths: dict[str, str] = {}
        for title, picture in self.render(image, prediction).items():
            paths[title] = f"{stem}_{title}.png"
            write_png(paths[title], picture)
        return paths

    def legend(self) -> Array | None:
        """A picture (H, W, 3) uint8 that says what the colours of `render` mean, or None."""
        return None

    def baseline(self, source: SampleSource, size: int) -> Baseline | None:
        """A prediction that needs no training beyond a pass over `source`, at label size, or None."""
        return None

    def official(self, folder: Path, source: SampleSource) -> OfficialResults:
        """A writer of the benchmark's own result format. Raises UserError where there is none."""
        raise UserError(f"task {self.name} has no official scoring program")

    def check_sample(self, sample: Sample) -> str | None:
        """What is suspicious about a readable sample, in one line for `uvim-fsq data check`, or None."""
        return None

    def prepare(self, root: str, progress: Callable[[int, int], None]) -> str:
        """Caches data in a form that loads faster and returns one line about it.

        `progress` is called with (done, total). Raises UserError where there is nothing to prepare.
        """
        raise UserError(f"task {self.name} reads its data as they are; there is nothing to prepare")
