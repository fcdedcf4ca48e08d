"""Time that the metrics of the three tasks take, compared with the programs that are commonly used for them.

The inputs are synthetic and the same in every run.
"""

from __future__ import annotations

import contextlib
import functools
import io
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import cv2
import numpy as np
import scipy.linalg
import torch
from PIL import Image

from uvim_fsq.benchmark.compare import compare, find_package
from uvim_fsq.data.sample import Sample
from uvim_fsq.performance.timing import Measurement, milliseconds, time_interleaved, time_repeats
from uvim_fsq.synthetic.render import render
from uvim_fsq.tasks.coco_panoptic.data import decode_ids
from uvim_fsq.tasks.coco_panoptic.metrics import PanopticMetric
from uvim_fsq.tasks.coco_panoptic.segments import MAX_ID, Segments, ids_to_rgb
from uvim_fsq.tasks.imagenet_color.fid import DIM, Moments, frechet_distance
from uvim_fsq.tasks.nyu_depth.metrics import DepthMetric

CPU = torch.device("cpu")
SIZE = (480, 640)
CATEGORIES = 133
BLANK = np.zeros((*SIZE, 3), np.uint8)


def measure_metrics(*, repeats: int, images: int = 20, features: int = 5000, dim: int = DIM) -> list[Measurement]:
    """Milliseconds of PQ and of the depth metrics per 480 x 640 image, and of FID between two sets.

    Args:
        repeats: number of timed repeats.
        images: number of rendered rooms.
        features: feature vectors per set; FID-5k has 5,000.
        dim: length of a feature vector; FID's network gives 2048.
    """
    scenes = [render(0, index, SIZE) for index in range(images)]
    lines = measure_panoptic([scene.segments for scene in scenes], repeats)
    lines.append(measure_depth([scene.depth for scene in scenes], repeats))
    return lines + measure_fid(features, dim, repeats)


def arbitrary_segments(ids: np.ndarray, seed: int) -> Segments:
    """The segments of a room, ids (H, W), with arbitrary ids and classes as in a real data set."""
    present = np.unique(ids[ids > 0])
    table = np.zeros(present.max() + 1, np.int32)
    table[present] = np.random.default_rng(seed).choice(MAX_ID, present.size, replace=False) + 1
    classes = (present % CATEGORIES + 1).astype(np.int32)
    return Segments(table[ids], table[present], classes, np.zeros(len(present), bool))


class PanopticCase:
    """Ground truth and predictions (the ground truth shifted by 9 pixels), in memory and as COCO PNGs in `folder`."""

    def __init__(self, rooms: Sequence[np.ndarray], folder: Path) -> None:
        truths = [arbitrary_segments(ids, seed) for seed, ids in enumerate(rooms)]
        self.folder = folder
        self.pairs = [(t, Segments(np.roll(t.ids, 9, 1), t.segment_ids, t.classes, t.crowd)) for t in truths]
        self.pixels: dict[str, np.ndarray] = {}
        self.annotations = [
            (self._write(truth, f"{i}_truth.png"), self._write(prediction, f"{i}_predicted.png"))
            for i, (truth, prediction) in enumerate(self.pairs)
        ]
        self.categories = {i: {"id": i, "isthing": i % 2} for i in range(1, CATEGORIES + 1)}

    def _write(self, segments: Segments, name: str) -> dict[str, Any]:
        self.pixels[name] = ids_to_rgb(segments.ids)
        # Pillow compresses about as well as COCO's own files; OpenCV hardly compresses.
        Image.fromarray(self.pixels[name]).save(self.folder / name)
        infos = [
            {"id": int(i), "category_id": int(c), "iscrowd": 0, "area": int((segments.ids == i).sum())}
            for i, c in zip(segments.segment_ids, segments.classes, strict=True)
        ]
        return {"image_id": name, "file_name": name, "segments_info": infos}

    def ours(self, from_files: bool) -> dict[str, float]:
        """Our metrics in percent, with ids decoded from the PNGs or already in memory."""
        names = [str(i) for i in self.categories]
        metric = PanopticMetric("benchmark", names, [bool(c["isthing"]) for c in self.categories.values()])
        for pair, entries in zip(self.pairs, self.annotations, strict=True):
            if from_files:
                pair = [replace(s, ids=self._read(e["file_name"])) for s, e in zip(pair, entries, strict=True)]
            metric.update(pair[1], Sample("room", BLANK, {}, {"segments": pair[0]}))
        result = metric.compute()
        return {key: result[key] for key in ("pq", "sq", "rq")}

    def _read(self, name: str) -> np.ndarray:
        return decode_ids((self.folder / name).read_bytes(), name)

    def panopticapi(self, evaluation: Any, from_files: bool) -> dict[str, float]:
        """panopticapi's metrics in percent, computed by its single-core function.

        That function always opens files. Without `from_files`, a stand-in for Pillow returns pixels from memory.

        Args:
            evaluation: the module `panopticapi.evaluation`.
        """
        opened = Image if from_files else SimpleNamespace(open=lambda path: self.pixels[Path(path).name])
        with contextlib.redirect_stdout(io.StringIO()), mock.patch.object(evaluation, "Image", opened):
            stat = evaluation.pq_compute_single_core(0, self.annotations, self.folder, self.folder, self.categories)
            result, _ = stat.pq_average(self.categories, isthing=None)
        return {key: 100.0 * float(result[key]) for key in ("pq", "sq", "rq")}


def measure_panoptic(rooms: Sequence[np.ndarray], repeats: int) -> list[Measurement]:
    """PQ of rooms, (H, W) int32 ids each, on one core, from memory and from PNGs, compared with panopticapi."""
    evaluation, version = find_package("panopticapi", "evaluation")
    lines: list[Measurement] = []
    with tempfile.TemporaryDirectory() as folder:
        case = PanopticCase(rooms, Path(folder))
        segments = float(np.mean([len(truth.segment_ids) for truth, _ in case.pairs]))
        for name, from_files in (("PQ per image", False), ("PQ per image from PNGs", True)):
            variants = {"ours": functools.partial(case.ours, from_files)}
            other: dict[str, Any] = {"segments": segments, "pq": variants["ours"]()["pq"], "panopticapi": version}
            if evaluation is not None:
                variants["panopticapi"] = functools.partial(case.panopticapi, evaluation, from_files)
                other["largest difference of pq, sq, rq"] = largest_difference(
                    variants["ours"](), variants["panopticapi"]()
                )
            timings = time_interleaved(variants, CPU, warmup=1, repeats=repeats)
            lines += compare(name, timings, ours="ours", count=len(rooms), **other)
    return lines


def largest_difference(ours: Mapping[str, float], theirs: Mapping[str, float]) -> float:
    """The largest absolute difference between metrics of the same name."""
    return max(abs(ours[name] - theirs[name]) for name in ours)


def measure_depth(rooms: Sequence[np.ndarray], repeats: int) -> Measurement:
    """Depth metrics of rooms, (H, W) float32 meters each; the predictions are 512 x 512 and 3% to 7% too far."""
    rng = np.random.default_rng(0)
    samples = [Sample("room", BLANK, {"depth": depth}) for depth in rooms]
    predictions = [
        cv2.resize(depth, (512, 512)) * rng.uniform(1.03, 1.07, (512, 512)).astype(np.float32) for depth in rooms
    ]

    def compute() -> dict[str, float]:
        metric = DepthMetric("benchmark")
        for prediction, sample in zip(predictions, samples, strict=True):
            metric.update(prediction, sample)
        return metric.compute()

    timing = time_repeats(compute, CPU, warmup=1, repeats=repeats)
    return milliseconds("depth metrics per image", timing, len(rooms), other={"abs_rel": compute()["abs_rel"]})


def synthetic_features(count: int, dim: int, seed: int) -> np.ndarray:
    """(count, dim) float64 numbers that resemble a network's features: non-negative, sparse and correlated."""
    mixing = np.random.default_rng(0).standard_normal((dim, dim)) * np.exp(-np.arange(dim) / 300)[:, None]
    numbers = np.random.default_rng(1 + seed).standard_normal((count, dim))
    return np.maximum(numbers @ mixing * 0.02 + 0.1 * seed, 0)


def moments_of(features: np.ndarray) -> Moments:
    """Moments of feature vectors (N, D), added in batches of 50."""
    moments = Moments(features.shape[1])
    for start in range(0, len(features), 50):
        moments.add(features[start : start + 50])
    moments.state()
    return moments


def sqrtm_distance(a: Moments, b: Moments) -> float:
    """The Fréchet distance of two sets by scipy's matrix square root, which most programs use."""
    first, second = a.covariance, b.covariance
    root = np.real(np.asarray(scipy.linalg.sqrtm(first @ second)))
    return float(np.square(a.mean - b.mean).sum() + np.trace(first) + np.trace(second) - 2 * np.trace(root))


def measure_fid(count: int, dim: int, repeats: int) -> list[Measurement]:
    """Moments of two sets of `count` vectors and their distance, the latter compared with scipy's sqrtm."""
    features = [synthetic_features(count, dim, seed) for seed in (0, 1)]
    timing = time_repeats(lambda: [moments_of(one) for one in features], CPU, warmup=0, repeats=repeats)
    size = f"2 x {count} x {dim}"
    moments = milliseconds(f"FID moments of {size}", timing)
    a, b = (moments_of(one) for one in features)
    distances: dict[str, float] = {}
    variants = {
        "ours": lambda: distances.update(ours=frechet_distance(a, b)),
        "scipy's sqrtm": lambda: distances.update(scipy=sqrtm_distance(a, b)),
    }
    # Each call takes seconds, so a few repeats are enough.
    timings = time_interleaved(variants, CPU, warmup=0, repeats=min(repeats, 3))
    difference = abs(distances["ours"] - distances["scipy"]) / distances["ours"]
    other = {"scipy": scipy.__version__, "fid": distances["ours"], "relative difference": difference}
    return [moments, *compare(f"FID distance of {size}", timings, ours="ours", **other)]
