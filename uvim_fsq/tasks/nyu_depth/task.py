"""Monocular depth as a label map of linear bins, 256 by default (UViM, arXiv 2205.10337, section 4; NYU Depth v2).

Shapes: B batch, S label size, H and W native size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.PngImagePlugin import PngInfo

from uvim_fsq.data.images import write_png
from uvim_fsq.data.resize import resize_nearest
from uvim_fsq.data.sample import Sample, SampleSource, smallest_integer
from uvim_fsq.data.tiles import Tile, align, blend
from uvim_fsq.errors import UserError
from uvim_fsq.files import write_whole
from uvim_fsq.tasks.base import Baseline, Categorical, LabelChannel, Task
from uvim_fsq.tasks.legend import color, draw_scale
from uvim_fsq.tasks.losses import pixel_cross_entropy
from uvim_fsq.tasks.nyu_depth.breakdown import ErrorByDepth
from uvim_fsq.tasks.nyu_depth.config import NYUDepthConfig
from uvim_fsq.tasks.nyu_depth.data import open_source, prepare
from uvim_fsq.tasks.nyu_depth.metrics import DepthMetric
from uvim_fsq.tasks.registry import register_task

#: Protocol -> scored part of the picture, as in the papers' published code; Garg's is that of arXiv 1603.04992.
REGIONS = {
    "kitti_garg": (0.40810811, 0.99189189, 0.03594771, 0.96405229),
    "kitti_eigen": (0.3324324, 0.91351351, 0.0359477, 0.96405229),
}
#: Largest depth that KITTI's protocols score, in meters.
KITTI_CAP = 80.0
#: Protocol -> (first row, end row, first column, end column); for 480 x 640 images only.
CROPS = {"uvim": (54, 480, 41, 601), "eigen": (45, 471, 41, 601)}


@register_task("nyu_depth")
class NYUDepth(Task):
    """Depth in meters from one image."""

    Config = NYUDepthConfig
    main_metric = "rmse"
    secondary_metrics = ("abs_rel", "delta1")
    synthetic = "nyu"
    config: NYUDepthConfig

    def __init__(self, config: NYUDepthConfig) -> None:
        if config.num_bins < 2 or not 0 <= config.min_depth < config.max_depth:
            raise UserError("task: needs num_bins >= 2 and 0 <= min_depth < max_depth")
        if config.depth_scale is not None and not 0 < config.depth_scale < math.inf:
            raise UserError(f"task.depth_scale={config.depth_scale}: must be a number above 0 (stored units per meter)")
        if config.max_eval_depth is not None and not 1e-3 < config.max_eval_depth < math.inf:
            raise UserError(f"task.max_eval_depth={config.max_eval_depth}: must be above 0.001 (meters)")
        super().__init__(config)
        self.dtype = smallest_integer(-1 if config.missing == "void" else 0, config.num_bins - 1)
        self.step = (config.max_depth - config.min_depth) / config.num_bins
        self.centers = torch.arange(config.num_bins) * self.step + self.step / 2 + config.min_depth

    @property
    def label_channels(self) -> dict[str, LabelChannel]:
        return {"depth": Categorical(self.config.num_bins)}

    def source(self, root: str, split: str) -> SampleSource:
        return open_source(root, split, self.config)

    def evaluation_view(self, sample: Sample) -> Sample:
        """The crop of image and truth by protocols uvim and eigen. Raises UserError for any size but 480 x 640."""
        if self.config.protocol not in CROPS:
            return sample
        if sample.image.shape[:2] != (480, 640):
            h, w = sample.image.shape[:2]
            raise UserError(
                f"{sample.id} is {h} x {w}; protocol {self.config.protocol} is defined for 480 x 640: "
                "use task.protocol=full"
            )
        top, bottom, left, right = CROPS[self.config.protocol]
        maps = {name: value[top:bottom, left:right] for name, value in sample.maps.items()}
        return Sample(sample.id, sample.image[top:bottom, left:right], maps, sample.meta)

    def encode(self, sample: Sample) -> dict[str, np.ndarray]:
        """The bin of each pixel, (S, S), in the smallest dtype: uint8 for up to 256 bins without void."""
        depth = sample.maps["depth"]
        c = self.config
        share = (depth - c.min_depth) / (c.max_depth - c.min_depth)
        share *= c.num_bins
        bins = share.clip(0, c.num_bins - 1, out=share).astype(self.dtype)
        if c.missing == "void":
            bins[depth <= c.min_depth] = -1
        return {"depth": bins}

    def loss(
        self, logits: Mapping[str, torch.Tensor], labels: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Cross-entropy over the bins. Pixels of bin 0 (if it means "missing") or -1 contribute 0 to the mean."""
        x, target = logits["depth"], labels["depth"].long()
        missing = target <= 0 if self.config.missing == "bin0" else target < 0
        loss, right = pixel_cross_entropy(x, target.masked_fill(missing, -1))
        return loss, {"bin_accuracy": right}

    def decode(self, logits: Mapping[str, torch.Tensor]) -> list[np.ndarray]:
        """(B, S, S, bins) logits -> (S, S) float32 meters per image."""
        return self.from_maps(self.to_maps(logits))

    def to_maps(self, logits: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        x = logits["depth"]
        centers = self.centers.to(x.device)
        depth = x.softmax(-1) @ centers if self.config.decoding == "expectation" else centers[x.argmax(-1)]
        return {"depth": depth.float()}

    def from_maps(self, maps: Mapping[str, torch.Tensor]) -> list[np.ndarray]:
        return list(maps["depth"].cpu().numpy())

    def describe_maps(self) -> dict[str, Any]:
        return {"depth": f"meters, {self.config.min_depth:g} to {self.config.max_depth:g}"}

    def breakdown(self, source: SampleSource) -> ErrorByDepth:
        metric = self.metric(source)
        return ErrorByDepth(metric, min(metric.max_depth, self.config.max_depth))

    def metric(self, source: SampleSource) -> DepthMetric:
        c = self.config
        # The valid range is that of the protocol, not that of the bins.
        region = REGIONS.get(c.protocol)
        usual = KITTI_CAP if region is not None else 10.0 if c.protocol in CROPS else c.max_depth
        cap = c.max_eval_depth or usual
        name = f"nyu_depth/{c.protocol}" + (f"_{cap:g}m" if cap != usual else "")
        return DepthMetric(name, 1e-3, cap, region)

    def render(self, image: np.ndarray, prediction: np.ndarray, truth: Sample | None = None) -> dict[str, np.ndarray]:
        """Color-coded depth, with the same range for prediction and truth; the error's range is a quarter of it."""
        depth = truth.maps["depth"] if truth is not None else None
        high = self._range(prediction if depth is None else depth)
        pictures = {"prediction": color(prediction, high)}
        if depth is not None:
            error = self._error(prediction, depth)
            pictures = {"ground truth": color(depth, high), **pictures, "error": color(error, high / 4, "inferno")}
        return pictures

    def captions(self, prediction: np.ndarray, truth: Sample) -> dict[str, str]:
        """The smallest and largest value of each map, and the range of its colors, in meters."""
        depth = truth.maps["depth"]
        high, error = self._range(depth), self._error(prediction, depth)
        valid = depth[depth > self.config.min_depth]
        return {
            "ground truth": f"{_extent(valid)}; colors 0 to {high:.2f} m",
            "prediction": f"{_extent(prediction)}; colors 0 to {high:.2f} m",
            "error": f"{_extent(error)}; colors 0 to {high / 4:.2f} m",
        }

    def prediction_legend(self, prediction: np.ndarray) -> np.ndarray:
        return draw_scale(self._range(prediction), "m")

    def _range(self, reference: np.ndarray) -> float:
        """The depth in meters at the end of the color scale."""
        positive = reference[reference > 0]
        return float(positive.max()) if positive.size else self.config.max_depth

    def _error(self, prediction: np.ndarray, depth: np.ndarray) -> np.ndarray:
        """(H, W) absolute error in meters, 0 where there is no truth."""
        resized = resize_nearest(prediction, (depth.shape[0], depth.shape[1]))
        return np.where(depth > self.config.min_depth, np.abs(resized - depth), 0)

    def tiled(self) -> NYUDepth:
        return self

    def merge_tiles(self, whole: np.ndarray, parts: Sequence[tuple[Tile, np.ndarray]], image: np.ndarray) -> np.ndarray:
        """Brings each tile to the scale and shift of the whole image's depth, and blends them.

        A tile alone shows too little to tell how far away everything is. The whole image knows that but has fewer
        details, as in arXiv 2105.14021.
        """
        size = (image.shape[0], image.shape[1])
        overall = resize_nearest(whole, size)
        fitted = (
            (tile, align(resize_nearest(depth, (tile.height, tile.width)), tile.of(overall))) for tile, depth in parts
        )
        return blend(size, fitted).clip(self.config.min_depth, self.config.max_depth)

    def spread(self, predictions: Sequence[np.ndarray]) -> np.ndarray:
        """The standard deviation in meters."""
        return np.std(np.stack(predictions), axis=0, dtype=np.float32)

    def film_frame(self, image: np.ndarray, prediction: np.ndarray) -> np.ndarray:
        """Color-coded depth from 0 to max_depth, the same in all frames."""
        return color(prediction, self.config.max_depth)

    def prediction_files(self, stem: str) -> dict[str, str]:
        return {"png": f"{stem}.png", "npy": f"{stem}.npy", "color": f"{stem}_color.png"}

    def save_prediction(self, prediction: np.ndarray, image: np.ndarray, stem: str) -> dict[str, str]:
        """stem.png: 16-bit millimeters, or 1/256 m as in KITTI for depths beyond 65 m; the scale is in its text chunks;
        stem.npy: float32 meters; stem_color.png.
        """
        depth = resize_nearest(prediction, image.shape[:2]).astype(np.float32)
        paths = self.prediction_files(stem)
        info = PngInfo()
        scale = 1000 if self.config.max_depth * 1000 <= 65535 else 256
        info.add_text("unit", "millimeter" if scale == 1000 else f"1/{scale} meter")
        info.add_text("depth_scale", str(scale))
        write_png(paths["png"], (depth * scale).round().clip(0, 65535).astype(np.uint16), info)
        write_whole(Path(paths["npy"]), lambda file: _save_array(file, depth), durable=False)
        write_png(paths["color"], self.render(image, depth)["prediction"])
        return paths

    def baseline(self, source: SampleSource, size: int) -> Baseline:
        """The mean depth map of `source` over valid pixels, (size, size) meters."""
        total, count = np.zeros((size, size)), np.zeros((size, size))
        for i in range(len(source)):
            depth = resize_nearest(self.evaluation_view(source[i]).maps["depth"], (size, size))
            valid = depth > self.config.min_depth
            total += np.where(valid, depth, 0)
            count += valid
        mean = total.sum() / max(count.sum(), 1)
        mean_map = np.where(count > 0, total / np.maximum(count, 1), mean).astype(np.float32)
        return Baseline("mean depth map of the training set", lambda image: mean_map)

    def check_sample(self, sample: Sample) -> str | None:
        return None if (sample.maps["depth"] > 0).any() else f"{sample.id}: no valid depth pixel in this image"

    def prepare(self, root: str, progress: Callable[[int, int], None]) -> str:
        return prepare(root, self.config, progress)


def _extent(values: np.ndarray) -> str:
    return f"{values.min():.2f} to {values.max():.2f} m" if values.size else "no value"


def _save_array(file: Path, array: np.ndarray) -> None:
    # Pass an open file, because np.save adds a suffix to a path.
    with file.open("wb") as opened:
        np.save(opened, array)
