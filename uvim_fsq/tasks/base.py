"""The Task interface: everything that differs between depth, segmentation, colorization and your own task.

A task reads its data set, encodes labels, computes the reconstruction loss and scores predictions. It is independent of
the models.

Shapes: B batch, P pixels (any number, in any order), S label size, H and W native size, C classes or channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from uvim_fsq.data.images import write_png
from uvim_fsq.data.resize import resize_nearest
from uvim_fsq.data.sample import Array, Sample, SampleSource
from uvim_fsq.data.tiles import Tile
from uvim_fsq.errors import UserError


@dataclass(frozen=True)
class Categorical:
    """A label channel of class indices 0..num_classes - 1; -1 means "no label" (neither input nor loss)."""

    num_classes: int


@dataclass(frozen=True)
class Real:
    """A label channel of `channels` real values per pixel, in [-1, 1]."""

    channels: int


LabelChannel = Categorical | Real


@dataclass(frozen=True)
class Matrix:
    """A table of numbers with names, e.g. a confusion matrix.

    Attributes:
        rows, columns: names of R rows and C columns.
        values: (R, C) float64.
    """

    rows: Sequence[str]
    columns: Sequence[str]
    values: Array


class Metric(ABC):
    """An accumulator of sums and counts, so that results do not depend on the batch size or the number of processes."""

    #: Name of the evaluation protocol, recorded in every result, e.g. "nyu_depth/uvim".
    protocol: str

    @property
    def details(self) -> dict[str, Any]:
        """What else the figures depend on, recorded in every result: e.g. a feature network and its weights' hash."""
        return {}

    @abstractmethod
    def update(self, prediction: Any, sample: Sample) -> dict[str, float]:
        """Adds one image and returns its own values (a row of the per-image CSV).

        Args:
            prediction: one item of `Task.decode`, at the model's label size.
            sample: the image as returned by `Task.evaluation_view`, at native size.
        """

    @abstractmethod
    def state(self) -> dict[str, Array]:
        """The sums and counts as float64 arrays of fixed shapes. The states of several processes are added."""

    @abstractmethod
    def load_state(self, state: Mapping[str, Array]) -> None:
        """Replaces the sums and counts, e.g. by the totals over processes."""

    @abstractmethod
    def compute(self) -> dict[str, float]:
        """The metrics over all images added. Raises UserError if there are none."""

    def matrices(self) -> dict[str, Matrix]:
        """Tables over all images added, by name, recorded in every result besides the metrics; by default none."""
        return {}


class Breakdown(ABC):
    """Figures for parts of the evaluated pixels or segments, e.g. the error by depth. Computed for reports only."""

    @abstractmethod
    def update(self, prediction: Any, sample: Sample) -> None:
        """Adds one image; arguments as for `Metric.update`."""

    @abstractmethod
    def state(self) -> dict[str, Array]:
        """The sums and counts as float64 arrays of fixed shapes. The states of several processes are added."""

    @abstractmethod
    def tables(self, state: Mapping[str, Array]) -> dict[str, Matrix]:
        """Title -> figures (columns) of each part (row), from the sum of the states; NaN where a part is empty."""


@dataclass(frozen=True)
class Baseline:
    """A trivial prediction to compare results with.

    Attributes:
        name: its description, e.g. "mean depth map of the training set".
        predict: maps a model input (S, S, 3), as from `Task.model_image`, to one prediction, as from `Task.decode`.
    """

    name: str
    predict: Callable[[Array], Any]


class OfficialResults(ABC):
    """Writes predictions in a benchmark's own result format and runs its scoring program."""

    @abstractmethod
    def add(self, prediction: Any, sample: Sample) -> Any:
        """Writes the files of one image; arguments as for `Metric.update`. Returns its entry for `finish`."""

    @abstractmethod
    def finish(self, entries: list[Any]) -> dict[str, float]:
        """Writes the files that cover all images and returns the metrics of the scoring program.

        `entries` are those of all processes. Raises UserError if the program is not installed or fails; files that were
        written stay.
        """


class Task(ABC):
    """One dense prediction task. Register it with `@register_task`; it is built as `Task(config)`."""

    #: The name it is registered under; set by the decorator.
    name: ClassVar[str]
    #: The task's own frozen dataclass; its fields are the keys under `task:` in the YAML, besides `name`. Its class
    #: attribute `changeable`, a tuple, lists the keys that may change after training: evaluation protocol, decoding,
    #: file locations. All others define the labels.
    Config: ClassVar[type]
    #: The metric that tables show first and that selects the best checkpoint, and whether smaller is better.
    main_metric: ClassVar[str]
    smaller_is_better: ClassVar[bool] = True
    #: Maps of a Sample to resize bilinearly (e.g. color); all others are resized by nearest neighbor.
    linear_maps: ClassVar[tuple[str, ...]] = ()
    #: Whether the labels are the colors of the photo, so that other colors would be other labels. `data.color_jitter`
    #: is then refused.
    labels_are_colors: ClassVar[bool] = False
    #: Metrics that tables show after the main metric.
    secondary_metrics: tuple[str, ...] = ()
    #: The `uvim-fsq synth` format of this task's data; None if there is none.
    synthetic: ClassVar[str | None] = None
    #: The `uvim-fsq synth` world in which the quickstart shows the task.
    synthetic_world: ClassVar[str] = "rooms"

    def __init__(self, config: Any) -> None:
        self.config = config

    @classmethod
    def resolve_config(cls, config: Any, root: str) -> Any:
        """Fills in settings that depend on the data under `root` (e.g. the categories); stored in the checkpoint.

        Called once, before an oracle is trained. Raises UserError if the data is missing.
        """
        return config

    @classmethod
    def placeholder_config(cls, config: Any) -> Any:
        """Replaces `resolve_config` where there is no data and only sizes matter (benchmarks): the standard data set's
        settings.
        """
        return config

    @property
    def choosing_metric(self) -> str | None:
        """The metric that selects a run's best checkpoint on a holdout split.

        None if the protocol reports a different metric; then the last checkpoint is used.
        """
        return self.main_metric

    @property
    @abstractmethod
    def label_channels(self) -> dict[str, LabelChannel]:
        """Name -> channel. Defines the oracle's input embeddings and output heads."""

    @abstractmethod
    def source(self, root: str, split: str) -> SampleSource:
        """Opens a split of the data under `root`; `split` is "train", "val" or a task-specific name.

        Raises UserError if the root is missing, incomplete or has an unknown layout.
        """

    def model_image(self, sample: Sample) -> Array:
        """The model input: by default the sample's image (colorization overrides it with the gray image).

        (H, W, 3) uint8, or float32 in [-1, 1].
        """
        return sample.image

    def evaluation_view(self, sample: Sample) -> Sample:
        """The part of a sample that is evaluated (e.g. NYU's crop); by default the whole sample."""
        return sample

    def adjust(self, maps: dict[str, Array], scale: tuple[float, float], *, mirrored: bool) -> dict[str, Array]:
        """Corrects map values that denote a direction or a distance in the image after a geometric transform; by
        default returns the maps unchanged.

        Called for every sample at the label size, before `encode`, but not for pictures to predict, which have no maps.
        Crop, resize and flip only move pixels: after a flip, a normal still points to the old left, and after halving
        the size, a flow of 10 pixels is still 10. Vectors of a map in `linear_maps` are means of neighbors: if they
        must have unit length, give it back to them here.

        Args:
            maps: (S, S) or (S, S, C) arrays; return new arrays instead of writing into these.
            scale: new pixels per old pixel, along rows and along columns.
            mirrored: whether left and right were exchanged; always False in evaluation, which does not flip.
        """
        return maps

    @abstractmethod
    def encode(self, sample: Sample) -> dict[str, Array]:
        """The labels of a sample that is already at the label size.

        Categorical channel: (S, S) integers, always of the same dtype; smaller dtypes are faster (`smallest_integer`).
        Real channel: (S, S, C) float32 in [-1, 1], or uint8, which is converted to [-1, 1] on the device, before any
        model or loss.
        """

    @abstractmethod
    def loss(
        self, logits: Mapping[str, torch.Tensor], labels: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Reconstruction loss: a mean over pixels, so that it can be computed on any subset of them.

        Args:
            logits: channel -> (B, P, C) float32.
            labels: channel -> (B, P) integer, or (B, P, C) float32.

        Returns:
            (B,) float32 loss per image, and logs: name -> (B,) tensors that are averaged like the loss.
        """

    def image_loss(
        self, logits: Mapping[str, torch.Tensor], labels: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """An additional loss that needs whole label maps (perceptual, dice, gradients), added to `loss` in stage I.

        Optional. Unless it is overridden, training does not compute the logits of whole maps.

        Args:
            logits: channel -> (B, S, S, C) float32.
            labels: channel -> (B, S, S) integer, or (B, S, S, C) float32.

        Returns:
            (B,) float32 loss per image, and logs: name -> (B,).
        """
        raise NotImplementedError(f"task {self.name} has no image-level loss")

    @property
    def has_image_loss(self) -> bool:
        """Whether the task overrides `image_loss`."""
        return type(self).image_loss is not Task.image_loss

    @abstractmethod
    def decode(self, logits: Mapping[str, torch.Tensor]) -> list[Any]:
        """Channel -> (B, S, S, C) logits to one prediction per image: NumPy, at label size.

        The logits of a categorical channel may also be log-probabilities, of a mixture of predictions. The result must
        therefore not depend on a constant that is added to all logits of a pixel.
        """

    def to_maps(self, logits: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The part of `decode` that can be exported with the models: tensor operations whose shapes depend on shapes
        only. By default nothing: the logits.

        Override it together with `from_maps` and `describe_maps`; `decode(x)` must equal `from_maps(to_maps(x))`.

        Args:
            logits: as for `decode`.

        Returns name -> (B, ...), the outputs of an exported model.
        """
        return dict(logits)

    def from_maps(self, maps: Mapping[str, torch.Tensor]) -> list[Any]:
        """The rest of `decode`: from the result of `to_maps` to one prediction per image."""
        return self.decode(maps)

    def describe_maps(self) -> dict[str, Any]:
        """What the results of `to_maps` mean, name -> text or a JSON value, for whoever uses an exported model."""
        channels = self.label_channels
        return {
            name: f"logits of {x.num_classes} classes" if isinstance(x, Categorical) else "values in [-1, 1]"
            for name, x in channels.items()
        }

    @abstractmethod
    def metric(self, source: SampleSource) -> Metric:
        """A new accumulator for the task's evaluation protocol on the images of `source`."""

    def breakdown(self, source: SampleSource) -> Breakdown | None:
        """A new accumulator of what reports show besides the metrics, e.g. the error by depth; by default None."""
        return None

    def to_size(self, prediction: Any, image: Array) -> Any:
        """Resizes one item of `decode` to the size of `image` (H, W, 3); by default, an array by nearest neighbor."""
        return resize_nearest(prediction, (image.shape[0], image.shape[1]))

    def tiled(self) -> Task:
        """The task by which the tiles of a large picture are decoded: itself, or one with the same channels whose
        predictions can be blended.

        Raises UserError if predictions of tiles cannot be merged, as by default.
        """
        raise UserError(f"task {self.name} cannot merge predictions of tiles; predict without --tiles")

    def merge_tiles(self, whole: Any, parts: Sequence[tuple[Tile, Any]], image: Array) -> Any:
        """Merges predictions of overlapping tiles to one of the size of `image`; see `data.tiles.blend`.

        Called on the result of `tiled`.

        Args:
            whole: one item of `decode` for the whole picture, which knows its overall scale.
            parts: at least two tiles that cover the picture, each with its item of `decode`, at label size.
            image: (H, W, 3) uint8.
        """
        raise NotImplementedError(f"task {self.name} does not merge tiles")

    @abstractmethod
    def render(self, image: Array, prediction: Any, truth: Sample | None = None) -> dict[str, Array]:
        """Images for reports: an ordered dict title -> (H, W, 3) uint8 with "prediction" and, given `truth`, "ground
        truth" and optionally "error".

        Args:
            image: (H, W, 3) uint8.
            prediction: one item of `decode` at the size of `image`.
            truth: the sample that `image` belongs to, or None.
        """

    def captions(self, prediction: Any, truth: Sample) -> dict[str, str]:
        """What the pictures of `render` hold, in a few words, e.g. the range of their values; by default nothing.

        Args:
            prediction: as for `render`.
            truth: as for `render`.

        Returns title of a picture -> text, for any of the titles of `render`.
        """
        return {}

    def spread(self, predictions: Sequence[Any]) -> Array | None:
        """How much several predictions of one image differ at each pixel: (H, W) float32, 0 where they are all equal.

        By default None: no measure.

        Args:
            predictions: items of `to_size`, at least one.
        """
        return None

    def film_frame(self, image: Array, prediction: Any) -> Array:
        """One frame of a film of predictions, (H, W, 3) uint8; arguments as for `render`, whose prediction it is by
        default.

        Override it if the colors of `render` depend on the picture, because then they would flicker.
        """
        return self.render(image, prediction)["prediction"]

    def prediction_files(self, stem: str) -> dict[str, str]:
        """Kind -> path of the files that `save_prediction` will write, to detect two images with the same output file.

        Override both methods together. Files that are not listed here are refused if they would replace something.
        """
        return {"prediction": f"{stem}_prediction.png"}

    def save_prediction(self, prediction: Any, image: Array, stem: str) -> dict[str, str]:
        """Writes one prediction, at the size of `image` (H, W, 3), to files that begin with `stem`.

        By default writes the images of `render`. Returns kind -> path. Raises UserError if they cannot be written.
        """
        paths: dict[str, str] = {}
        for title, picture in self.render(image, prediction).items():
            paths[title] = f"{stem}_{title}.png"
            write_png(paths[title], picture)
        return paths

    def legend(self) -> Array | None:
        """An image (H, W, 3) uint8 that explains the colors of `render`, or None."""
        return None

    def prediction_legend(self, prediction: Any) -> Array | None:
        """An image (H, W, 3) uint8 that explains the colors of `render` for one prediction without truth, e.g. the
        range of its values or the classes in it; by default `legend`.
        """
        return self.legend()

    def baseline(self, source: SampleSource, size: int) -> Baseline | None:
        """A trivial prediction of side `size`, computed in one pass over `source`, or None."""
        return None

    def official(self, folder: Path, source: SampleSource) -> OfficialResults:
        """A writer of the benchmark's own result format, in `folder`. Raises UserError if there is none."""
        raise UserError(f"task {self.name} has no official scoring program")

    def check_sample(self, sample: Sample) -> str | None:
        """A one-line warning about a suspicious but readable sample, for `uvim-fsq data check`, or None."""
        return None

    def prepare(self, root: str, progress: Callable[[int, int], None]) -> str:
        """Converts the data to a form that loads faster and returns a one-line summary.

        `progress` is called with (done, total). Raises UserError if there is nothing to prepare.
        """
        raise UserError(f"task {self.name} reads its data as it is; there is nothing to prepare")

    @classmethod
    def convert(cls, root: str, out: Path | None, progress: Callable[[int, int], None]) -> str:
        """Converts labels as they are distributed to a format that `source` reads, and returns a one-line summary.

        Args:
            root: the data set.
            out: folder for the converted labels, None: with the data set.
            progress: called with (done, total).

        Raises UserError if there is nothing to convert.
        """
        raise UserError(f"task {cls.name} reads its data as it is; there is nothing to convert")
