"""Semantic segmentation as one label map of classes.

Shapes: B batch, S label size, H and W native size, C classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import torch

from uvim_fsq.data.images import write_png
from uvim_fsq.data.resize import resize_nearest
from uvim_fsq.data.roots import find_data_root
from uvim_fsq.data.sample import Sample, SampleSource, smallest_integer
from uvim_fsq.data.tiles import Tile, blend
from uvim_fsq.errors import UserError
from uvim_fsq.tasks.base import Baseline, Categorical, LabelChannel, Metric, Task
from uvim_fsq.tasks.legend import beside, draw_legend
from uvim_fsq.tasks.losses import pixel_cross_entropy
from uvim_fsq.tasks.registry import register_task
from uvim_fsq.tasks.semantic_segmentation.classes import check_classes, find_class_file, read_classes
from uvim_fsq.tasks.semantic_segmentation.config import SemanticSegmentationConfig
from uvim_fsq.tasks.semantic_segmentation.data import ClassTable, SavedSource, SegmentationSource, open_source
from uvim_fsq.tasks.semantic_segmentation.metrics import SegmentationMetric, class_map, most_likely
from uvim_fsq.tasks.spread import disagreement

#: Weight of the class colors over the photo.
SHARE = 0.6


@register_task("semantic_segmentation")
class SemanticSegmentation(Task):
    """The class of each pixel."""

    Config = SemanticSegmentationConfig
    main_metric = "miou"
    smaller_is_better = False
    secondary_metrics = ("pixel_accuracy", "mean_accuracy")
    synthetic = "semantic"
    synthetic_world = "still_life"
    config: SemanticSegmentationConfig

    def __init__(self, config: SemanticSegmentationConfig) -> None:
        if not config.classes:
            raise UserError("task.classes is empty; they are read from the class file under data.root")
        super().__init__(config)
        self.table = ClassTable.of(config)
        self.dtype = smallest_integer(-1, len(self.table.names) - 1)

    @classmethod
    def resolve_config(cls, config: SemanticSegmentationConfig, root: str) -> SemanticSegmentationConfig:
        """Reads the classes from the class file."""
        if config.classes:
            return config
        classes = read_classes(find_class_file(find_data_root(root), config.class_file))
        return dataclasses.replace(config, classes=classes)

    @classmethod
    def placeholder_config(cls, config: SemanticSegmentationConfig) -> SemanticSegmentationConfig:
        """Placeholders for the 150 classes of ADE20K."""
        rows = [(i, f"class {i}", None) for i in range(150)]
        return dataclasses.replace(config, classes=check_classes(rows, "task.classes"), ignore_names=())

    @property
    def names(self) -> list[str]:
        """The names of the classes, in the order of the labels."""
        return list(self.table.names)

    @property
    def label_channels(self) -> dict[str, LabelChannel]:
        return {"classes": Categorical(len(self.table.names))}

    def source(self, root: str, split: str) -> SegmentationSource | SavedSource:
        return open_source(root, split, self.config)

    def encode(self, sample: Sample) -> dict[str, np.ndarray]:
        """The class of each pixel, (S, S), -1 for no label, in the smallest dtype: int8 for up to 128 classes."""
        return {"classes": sample.maps["classes"].astype(self.dtype)}

    def loss(
        self, logits: Mapping[str, torch.Tensor], labels: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Cross-entropy over the classes. Pixels without a label contribute 0 to the mean over all pixels."""
        loss, right = pixel_cross_entropy(logits["classes"], labels["classes"])
        return loss, {"pixel_accuracy": right}

    def decode(self, logits: Mapping[str, torch.Tensor]) -> list[np.ndarray]:
        """(B, S, S, C) logits -> (S, S) class indices per image; with enlarge=linear, (S, S, C) probabilities."""
        return self.from_maps(self.to_maps(logits))

    def to_maps(self, logits: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        x = logits["classes"]
        return {"classes": x.float().softmax(-1) if self.config.enlarge == "linear" else x.argmax(-1)}

    def from_maps(self, maps: Mapping[str, torch.Tensor]) -> list[np.ndarray]:
        return list(maps["classes"].cpu().numpy())

    def describe_maps(self) -> dict[str, Any]:
        kind = "probability of each class" if self.config.enlarge == "linear" else "index of the class"
        return {"classes": {"meaning": kind, "names": self.names}}

    def metric(self, source: SampleSource) -> Metric:
        name = "miou" if self.config.enlarge == "nearest" else f"miou+{self.config.enlarge}"
        return SegmentationMetric(f"semantic_segmentation/{name}", self.table.names)

    def to_size(self, prediction: np.ndarray, image: np.ndarray) -> np.ndarray:
        """(H, W) class indices."""
        return class_map(prediction, (image.shape[0], image.shape[1]))

    def tiled(self) -> SemanticSegmentation:
        """The task with enlarge=linear, because probabilities can be blended and class indices cannot."""
        return type(self)(dataclasses.replace(self.config, enlarge="linear"))

    def merge_tiles(self, whole: np.ndarray, parts: Sequence[tuple[Tile, np.ndarray]], image: np.ndarray) -> np.ndarray:
        """(H, W) class indices: the most likely class by the tiles' blended probabilities; `whole` is not used."""
        size = (image.shape[0], image.shape[1])

        def plane(c: int) -> np.ndarray:
            shares = ((t, cv2.resize(np.ascontiguousarray(p[..., c]), (t.width, t.height))) for t, p in parts)
            return blend(size, shares)

        return most_likely(map(plane, range(len(self.table.names))), size)

    def spread(self, predictions: Sequence[np.ndarray]) -> np.ndarray:
        """The share of predictions whose class is not the most frequent one."""
        return disagreement(predictions)

    def render(self, image: np.ndarray, prediction: np.ndarray, truth: Sample | None = None) -> dict[str, np.ndarray]:
        """Class colors over the photo; the error shows wrong pixels in white and pixels without a label in gray."""
        pictures = {"prediction": self._paint(image, prediction)}
        if truth is not None:
            classes = truth.maps["classes"]
            error = np.where(classes < 0, 96, 255 * (prediction != classes)).astype(np.uint8)
            error = np.repeat(error[..., None], 3, axis=-1)
            pictures = {"ground truth": self._paint(image, classes), **pictures, "error": error}
        return pictures

    def captions(self, prediction: np.ndarray, truth: Sample) -> dict[str, str]:
        classes = truth.maps["classes"]
        labeled = classes >= 0
        found = len(np.unique(classes[labeled])), len(np.unique(prediction))
        texts = {"ground truth": f"{found[0]} classes", "prediction": f"{found[1]} classes"}
        if labeled.any():
            texts["error"] = f"{(prediction != classes)[labeled].mean():.1%} of labeled pixels"
        return texts

    def _paint(self, image: np.ndarray, classes: np.ndarray) -> np.ndarray:
        mixed = ((1 - SHARE) * image + SHARE * self.table.colors[classes]).astype(np.uint8)
        mixed[classes < 0] = image[classes < 0]
        return mixed

    def legend(self) -> np.ndarray:
        return draw_legend(self.table.names, self.table.colors)

    def prediction_legend(self, prediction: np.ndarray) -> np.ndarray:
        return self._legend_of(prediction)

    def _legend_of(self, prediction: np.ndarray, height: int | None = None) -> np.ndarray:
        """The classes that a prediction (H, W) has, in columns of at most `height` pixels."""
        present = np.unique(prediction)
        return draw_legend([self.table.names[c] for c in present], self.table.colors[present], height)

    def prediction_files(self, stem: str) -> dict[str, str]:
        return {"png": f"{stem}.png", "overlay": f"{stem}_overlay.png"}

    def save_prediction(self, prediction: np.ndarray, image: np.ndarray, stem: str) -> dict[str, str]:
        """stem.png: pixel values of the class file, 8 or 16 bits; stem_overlay.png: colors over the photo, legend."""
        paths = self.prediction_files(stem)
        values = self.table.values.astype(np.uint8 if self.table.values.max() < 256 else np.uint16)
        write_png(paths["png"], values[prediction])
        side = self._legend_of(prediction, image.shape[0])
        write_png(paths["overlay"], beside(self._paint(image, prediction), side))
        return paths

    def baseline(self, source: SampleSource, size: int) -> Baseline:
        """The most frequent class of each pixel over `source`; where there is no label, the most frequent class."""
        counts = np.zeros((size * size, len(self.table.names)), np.int32)
        pixels = np.arange(size * size)
        for i in range(len(source)):
            classes = resize_nearest(source[i].maps["classes"], (size, size)).ravel()
            labeled = classes >= 0
            counts[pixels[labeled], classes[labeled]] += 1
        common = np.where(counts.any(1), counts.argmax(1), counts.sum(0).argmax()).reshape(size, size)
        return Baseline("most frequent class of each pixel in the training set", lambda image: common)

    def check_sample(self, sample: Sample) -> str | None:
        return None if (sample.maps["classes"] >= 0).any() else f"{sample.id}: no pixel of this image has a label"
