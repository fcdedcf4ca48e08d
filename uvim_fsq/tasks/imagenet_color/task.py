"""Colorization of gray photos (UViM, arXiv 2205.10337, section 4; ImageNet).

Shapes: B batch, S label size, H and W native size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import torch

from uvim_fsq import processes
from uvim_fsq.data.images import write_png
from uvim_fsq.data.resize import resize_linear
from uvim_fsq.data.roots import find_data_root
from uvim_fsq.data.sample import Sample, SampleSource
from uvim_fsq.data.saved_datasets import is_saved_dataset
from uvim_fsq.data.tiles import Tile, blend
from uvim_fsq.errors import UserError
from uvim_fsq.tasks.base import Baseline, LabelChannel, Metric, Real, Task
from uvim_fsq.tasks.imagenet_color.coltran import crop_and_resize
from uvim_fsq.tasks.imagenet_color.config import ImagenetColorConfig
from uvim_fsq.tasks.imagenet_color.data import PhotoSource, SavedPhotos, open_saved, open_source
from uvim_fsq.tasks.imagenet_color.distances import FeatureDistance
from uvim_fsq.tasks.imagenet_color.features import TimmFeatures
from uvim_fsq.tasks.imagenet_color.fid import Inception
from uvim_fsq.tasks.imagenet_color.metrics import (
    COLORFULNESS,
    COLTRAN_SIZE,
    GRAY,
    FIDMetric,
    PSNRMetric,
    colorfulness,
    keep_luma,
    to_picture,
    to_unit,
)
from uvim_fsq.tasks.registry import register_task


@register_task("imagenet_color")
class ImagenetColor(Task):
    """RGB values in [-1, 1] from a gray photo."""

    Config = ImagenetColorConfig
    main_metric = "psnr"
    smaller_is_better = False
    secondary_metrics = ("mse", *COLORFULNESS)
    synthetic = "imagenet"
    synthetic_world = "still_life"
    labels_are_colors = True
    config: ImagenetColorConfig

    def __init__(self, config: ImagenetColorConfig) -> None:
        if config.features_reference < 0:
            raise UserError(f"task.features_reference={config.features_reference}: needs 0 (all photos) or more")
        super().__init__(config)
        if config.features:
            self.secondary_metrics = (*type(self).secondary_metrics, f"fd_{config.features}")

    @property
    def label_channels(self) -> dict[str, LabelChannel]:
        return {"color": Real(3)}

    @property
    def choosing_metric(self) -> str | None:
        """PSNR; None for the FID protocols, because PSNR must not select the checkpoint that FID is reported for."""
        return self.main_metric if self.config.protocol == "psnr" else None

    def source(self, root: str, split: str) -> PhotoSource | SavedPhotos:
        if self.config.protocol == "coltran" and split == "val":
            split = "coltran_evaluation"
        place = find_data_root(root)
        if is_saved_dataset(place):
            return open_saved(place, split, self.config.image_column)
        return open_source(root, split)

    def evaluation_view(self, sample: Sample) -> Sample:
        """FID protocols: the center crop, area-resized to 512 x 512 and rounded; its values mean x / 128 - 1."""
        if self.config.protocol == "psnr":
            return sample
        view = crop_and_resize(sample.image, COLTRAN_SIZE)
        return Sample(sample.id, view, {}, {**sample.meta, "scale": 128.0, "photo": sample.image})

    def model_image(self, sample: Sample) -> np.ndarray:
        """The gray photo, (H, W, 3) with equal channels: uint8, or for the FID protocols float32 in [-1, 1]."""
        if "scale" in sample.meta:
            gray_image = to_unit(sample.image, sample) @ np.array(GRAY, np.float32)
            return np.repeat(gray_image[..., None], 3, axis=-1)
        return gray(sample.image)

    def encode(self, sample: Sample) -> dict[str, np.ndarray]:
        """The photo itself, (S, S, 3) uint8; for the FID protocols, float32 in [-1, 1]."""
        return {"color": to_unit(sample.image, sample) if "scale" in sample.meta else sample.image}

    def loss(
        self, logits: dict[str, torch.Tensor], labels: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Mean squared error over pixels and channels."""
        loss = (logits["color"] - labels["color"]).square().mean((1, 2))
        return loss, {"mse": loss.detach()}

    def decode(self, logits: dict[str, torch.Tensor]) -> list[np.ndarray]:
        """(B, S, S, 3) -> (S, S, 3) float32 in [-1, 1] per image."""
        return self.from_maps(self.to_maps(logits))

    def to_maps(self, logits: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"color": logits["color"].clamp(-1, 1).float()}

    def from_maps(self, maps: Mapping[str, torch.Tensor]) -> list[np.ndarray]:
        return list(maps["color"].cpu().numpy())

    def describe_maps(self) -> dict[str, Any]:
        return {"color": "red, green and blue in [-1, 1]"}

    def metric(self, source: SampleSource) -> Metric:
        config, device = self.config, processes.device()
        protocol = f"imagenet_color/{config.protocol}{'+keep_luma' if config.keep_luma else ''}"
        fit = "resize" if config.protocol == "psnr" else "crop"
        distance = None
        if config.features:
            name, weights, limit = config.features, config.features_weights, config.features_reference
            reference = self._reference(source, config.fid_reference)
            distance = FeatureDistance(reference, TimmFeatures(name, weights, device), fit, limit)
        psnr = PSNRMetric(protocol, config.keep_luma, distance)
        if config.protocol == "psnr":
            return psnr
        coltran = config.protocol == "coltran"
        reference = self._reference(source, "coltran_reference" if coltran else config.fid_reference)
        inception = FeatureDistance(reference, Inception(config.inception_weights, device), fit)
        return FIDMetric(psnr, inception, coltran and source.info["split"] == "coltran_evaluation")

    def _reference(self, source: SampleSource, split: str) -> PhotoSource:
        """The photos of the reference set. Raises UserError if they are those of `source`, or not in files."""
        if isinstance(source, SavedPhotos):
            key = "features" if self.config.protocol == "psnr" else "protocol"
            raise UserError(f"task.{key}={getattr(self.config, key)} needs photos in files, not in a saved data set")
        assert isinstance(source, PhotoSource)
        if source.info["split"] == split:
            raise UserError(f"task.fid_reference={split} is the evaluation split itself; choose another one")
        return open_source(str(source.root), split)

    def to_size(self, prediction: np.ndarray, image: np.ndarray) -> np.ndarray:
        """Resizes bilinearly; with keep_luma, the luma is that of the photo at full resolution."""
        resized = resize_linear(prediction, image.shape[:2])
        return keep_luma(resized, to_unit(image, Sample("", image))) if self.config.keep_luma else resized

    def tiled(self) -> ImagenetColor:
        return self

    def merge_tiles(self, whole: np.ndarray, parts: Sequence[tuple[Tile, np.ndarray]], image: np.ndarray) -> np.ndarray:
        """Blends the colors; `whole` is not used."""
        enlarged = ((tile, resize_linear(color, (tile.height, tile.width))) for tile, color in parts)
        return self.to_size(blend((image.shape[0], image.shape[1]), enlarged), image)

    def spread(self, predictions: Sequence[np.ndarray]) -> np.ndarray:
        """The root of the color channels' mean variance, in units of [-1, 1]."""
        return np.sqrt(np.var(np.stack(predictions), axis=0, dtype=np.float32).mean(-1))

    def render(self, image: np.ndarray, prediction: np.ndarray, truth: Sample | None = None) -> dict[str, np.ndarray]:
        pictures = {"prediction": to_picture(prediction)}
        return pictures if truth is None else {"ground truth": image, **pictures}

    def captions(self, prediction: np.ndarray, truth: Sample) -> dict[str, str]:
        shown = {"ground truth": truth.image, "prediction": to_picture(prediction)}
        return {
            title: f"values {values.min()} to {values.max()}, colorfulness {colorfulness(values):.0f}"
            for title, values in shown.items()
        }

    def prediction_files(self, stem: str) -> dict[str, str]:
        kind = "keep_luma" if self.config.keep_luma else "color"
        return {kind: f"{stem}_{kind}.png"}

    def save_prediction(self, prediction: np.ndarray, image: np.ndarray, stem: str) -> dict[str, str]:
        """stem_color.png, or stem_keep_luma.png with keep_luma: 8-bit RGB."""
        paths = self.prediction_files(stem)
        (path,) = paths.values()
        write_png(path, to_picture(prediction))
        return paths

    def baseline(self, source: SampleSource, size: int) -> Baseline:
        """The gray photo itself."""

        def predict(image: np.ndarray) -> np.ndarray:
            return image if image.dtype != np.uint8 else to_unit(image, Sample("", image))

        return Baseline("the gray photo itself", predict)

    def check_sample(self, sample: Sample) -> str | None:
        return f"{sample.id}: only {sample.image.shape[:2]} pixels" if min(sample.image.shape[:2]) < 16 else None


def gray(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 RGB -> (H, W, 3) uint8 gray with equal channels, identical to the UViM reference code."""
    weights = np.array(GRAY, np.float32) / np.float32(255)
    # Sum from red to blue, like a matrix product: the last bit can decide how the result is truncated.
    red, green, blue = (plane * weight for plane, weight in zip(cv2.split(image), weights, strict=True))
    red += green
    red += blue
    # The image library of the reference code converts [0, 1] to integers this way.
    red *= np.float32(255.5)
    return cv2.merge([red.astype(np.uint8)] * 3)
