"""The Task interface: everything that differs between depth, panoptic, colour and your own task.

A task is pure functions over arrays; it knows nothing of models, Accelerate or files outside its own adapter.
Shapes: B batch, P pixels (any number, any order), S label size, H and W native size, C classes or channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from uvim_fsq.data.sample import Array, Sample, SampleSource


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


class Task(ABC):
    """One dense prediction task. Registered with `@register_task`; built as `Task(config)`."""

    #: The registry's name, set by the decorator.
    name: ClassVar[str]
    #: The task's own frozen dataclass; its fields are the keys under `task:` in the YAML, beside `name`.
    Config: ClassVar[type]
    #: The metric that picks the best checkpoint, and whether smaller is better.
    main_metric: ClassVar[str]
    smaller_is_better: ClassVar[bool] = True
    #: Maps of a Sample that are resampled bilinearly (colour); all others by nearest neighbour.
    linear_maps: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: Any) -> None:
        self.config = config

    @property
    @abstractmethod
    def label_channels(self) -> dict[str, LabelChannel]:
        """Name -> channel. It alone drives the oracle's input embeddings and heads."""

    @abstractmethod
    def source(self, root: str, split: str) -> SampleSource:
        """Opens the data under `root`. `split` is "train", "val" or a name of the task's own.

        Raises UserError when the root is missing, is of no known layout or is incomplete.
        """

    def model_image(self, image: Array) -> Array:
        """What the models may see of an (H, W, 3) uint8 image: itself, or e.g. its grey version for colorization."""
        return image

    def evaluation_view(self, sample: Sample) -> Sample:
        """The part of a sample that evaluation is about (e.g. NYU's crop); the whole sample unless overridden."""
        return sample

    @abstractmethod
    def encode(self, sample: Sample) -> dict[str, Array]:
        """Labels of a sample at the label size: channel -> (S, S) int16, or (S, S, C) float32 in [-1, 1]."""

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

    @abstractmethod
    def decode(self, logits: Mapping[str, torch.Tensor]) -> list[Any]:
        """One prediction per image from channel -> (B, S, S, C) logits; numpy, on the host, at label size."""

    @abstractmethod
    def metric(self) -> Metric:
        """A fresh accumulator of the task's protocol."""

    @abstractmethod
    def to_size(self, prediction: Any, size: tuple[int, int]) -> Any:
        """One item of `decode` resampled to (height, width) as the task's protocol asks."""

    @abstractmethod
    def render(self, image: Array, prediction: Any, ground_truth: Any | None = None) -> dict[str, Array]:
        """Pictures for reports: an ordered dict title -> (H, W, 3) uint8, e.g. prediction, ground truth, error.

        Args:
            image: (H, W, 3) uint8.
            prediction: one item of `decode`, any size.
            ground_truth: `Sample.maps` of the same image, or None.
        """

    @abstractmethod
    def save_prediction(self, prediction: Any, image: Array, stem: str) -> dict[str, str]:
        """Writes one prediction, at the size of `image` (H, W, 3), as `stem`*.png/.npy; returns kind -> path."""

    def baseline(self, source: SampleSource, size: int) -> Any:
        """A prediction that ignores the image (e.g. the mean map of the training set) at label size, or None."""
        return None
