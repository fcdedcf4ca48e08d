"""Panoptic segmentation as two label maps, semantics and instances (UViM, arXiv 2205.10337, section 4; COCO 2017).

Shapes: B batch, S label size, C classes besides void, N instances including void.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from uvim_fsq.data.images import write_png
from uvim_fsq.data.resize import resize_nearest
from uvim_fsq.data.roots import find_data_root
from uvim_fsq.data.sample import Sample, SampleSource
from uvim_fsq.errors import UserError
from uvim_fsq.files import write_json
from uvim_fsq.tasks.base import Baseline, Categorical, LabelChannel, Metric, OfficialResults, Task
from uvim_fsq.tasks.coco_panoptic import render
from uvim_fsq.tasks.coco_panoptic.breakdown import QualityBySize
from uvim_fsq.tasks.coco_panoptic.config import CocoPanopticConfig
from uvim_fsq.tasks.coco_panoptic.convert import convert
from uvim_fsq.tasks.coco_panoptic.data import PanopticSource, open_source, prepare
from uvim_fsq.tasks.coco_panoptic.index import read_index
from uvim_fsq.tasks.coco_panoptic.instance_results import InstanceResults
from uvim_fsq.tasks.coco_panoptic.instances import read_instances
from uvim_fsq.tasks.coco_panoptic.labels import encode_panoptic, instance_scores, panoptic_from_logits, to_segments
from uvim_fsq.tasks.coco_panoptic.layouts import find_annotations
from uvim_fsq.tasks.coco_panoptic.metrics import PanopticMetric
from uvim_fsq.tasks.coco_panoptic.results import CocoResults
from uvim_fsq.tasks.coco_panoptic.segments import Segments, ids_to_rgb
from uvim_fsq.tasks.losses import pixel_cross_entropy
from uvim_fsq.tasks.registry import register_task
from uvim_fsq.tasks.spread import disagreement


@register_task("coco_panoptic")
class CocoPanoptic(Task):
    """Panoptic segmentation: one segment per thing, one per stuff class."""

    Config = CocoPanopticConfig
    main_metric = "pq"
    smaller_is_better = False
    secondary_metrics = ("sq", "rq", "pq_things", "pq_stuff")
    synthetic = "coco_panoptic"
    synthetic_world = "still_life"
    config: CocoPanopticConfig

    def __init__(self, config: CocoPanopticConfig) -> None:
        if not config.categories:
            raise UserError("task.categories is empty; they are read from the annotation file under data.root")
        if not 1 <= config.max_instances < 1000 or not 0 <= config.min_fraction < 1:
            raise UserError("task: needs 1 <= max_instances < 1000 and 0 <= min_fraction < 1")
        if config.annotations == "instances" and config.void == "ignore":
            raise UserError("task.void=ignore would hide the background of the instances; leave task.void at class")
        if any(not 0 <= value <= 255 for color in config.colors for value in color):
            raise UserError("task.colors: needs (red, green, blue) from 0 to 255 for each class")
        super().__init__(config)
        self.names = ["void", *(name for _, name, _ in config.categories)]
        self.is_thing = np.array([False, *(thing for _, _, thing in config.categories)])
        self.palette = render.class_palette(len(config.categories), config.colors)

    @classmethod
    def resolve_config(cls, config: CocoPanopticConfig, root: str) -> CocoPanopticConfig:
        """Reads the categories from the training annotations, or from those of val if there are no others.

        Whether they are instances is fixed too, because it says what unlabeled pixels are.
        """
        if config.categories:
            return config
        place = find_data_root(root)
        try:
            layout, file = find_annotations(place, "train", config.annotations)
        except UserError:
            layout, file = find_annotations(place, "val", config.annotations)
        index = read_instances(file) if layout.instances else read_index(file)
        return dataclasses.replace(
            config,
            annotations="instances" if layout.instances else config.annotations,
            categories=index.categories,
            colors=tuple((int(r), int(g), int(b)) for r, g, b in index.colors),
        )

    @classmethod
    def placeholder_config(cls, config: CocoPanopticConfig) -> CocoPanopticConfig:
        """Placeholders for COCO's 80 thing and 53 stuff classes."""
        return dataclasses.replace(config, categories=tuple((i, f"class {i}", i <= 80) for i in range(1, 134)))

    @property
    def label_channels(self) -> dict[str, LabelChannel]:
        return {"semantics": Categorical(len(self.names)), "instances": Categorical(self.config.max_instances + 1)}

    def source(self, root: str, split: str) -> PanopticSource:
        return open_source(root, split, self.config)

    def encode(self, sample: Sample) -> dict[str, np.ndarray]:
        """semantics (0 void, 1..C) and instances (0 void, 1..N - 1 by center of mass after the crop), both (S, S).

        -1 in both means no label. Each has the smallest dtype that holds its labels; for COCO, int16 and int8.
        """
        truth: Segments = sample.meta["segments"]
        unlabeled = np.concatenate([[False], truth.crowd & (self.config.crowd == "ignore")])
        classes = np.concatenate([[0], truth.classes])
        void = -1 if self.config.void == "ignore" else 0
        numbers = sample.maps["segments"]
        return encode_panoptic(numbers, classes, unlabeled, len(self.names), self.config.max_instances, void)

    def loss(
        self, logits: Mapping[str, torch.Tensor], labels: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The sum of the cross-entropies of both maps. Pixels labeled -1 contribute 0 to the mean over all pixels."""
        classes, classes_right = pixel_cross_entropy(logits["semantics"], labels["semantics"])
        instances, instances_right = pixel_cross_entropy(logits["instances"], labels["instances"])
        logs = {"semantics_accuracy": classes_right, "instances_accuracy": instances_right}
        return classes + instances, logs

    def decode(self, logits: Mapping[str, torch.Tensor]) -> list[Segments]:
        """(B, S, S, C + 1) and (B, S, S, N) logits -> the segments of each image at label size."""
        return self.from_maps(self.to_maps(logits))

    def to_maps(self, logits: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        semantics, instances = logits["semantics"], logits["instances"]
        classes, chosen = panoptic_from_logits(semantics, instances, self.config.min_fraction)
        maps = {"semantics": classes, "instances": chosen}
        if self.config.annotations == "instances":
            maps["scores"] = instance_scores(semantics, instances, classes, chosen)
        return maps

    def from_maps(self, maps: Mapping[str, torch.Tensor]) -> list[Segments]:
        classes, instances = (maps[name].cpu().numpy() for name in ("semantics", "instances"))
        scores = maps["scores"].cpu().numpy() if "scores" in maps else [None] * len(classes)
        return [to_segments(c, i, self.is_thing, score) for c, i, score in zip(classes, instances, scores, strict=True)]

    def describe_maps(self) -> dict[str, Any]:
        things = [name for name, thing in zip(self.names, self.is_thing, strict=True) if thing]
        meaning = {
            "semantics": {"meaning": "index of the class", "names": self.names, "things": things},
            "instances": "number of the instance of each pixel; its class is that of `semantics`, and segments of a "
            "class that is no thing are one",
        }
        if self.config.annotations == "instances":
            meaning["scores"] = "how certain each instance is, 0 to 1, by its number"
        return meaning

    def metric(self, source: SampleSource) -> Metric:
        assert isinstance(source, PanopticSource)
        protocol = "coco_instances/pq" if source.instances else "coco_panoptic/pq"
        things = [bool(x) for x in self.is_thing[1:]]
        return PanopticMetric(protocol, self.names[1:], things, background=source.instances)

    def breakdown(self, source: SampleSource) -> QualityBySize:
        assert isinstance(source, PanopticSource)
        return QualityBySize(len(self.names) - 1, background=source.instances)

    def official(self, folder: Path, source: SampleSource) -> OfficialResults:
        assert isinstance(source, PanopticSource)
        ids = [category[0] for category in self.config.categories]
        return InstanceResults(folder, source, ids) if source.instances else CocoResults(folder, source, ids)

    def to_size(self, prediction: Segments, image: np.ndarray) -> Segments:
        """Resizes by nearest neighbor; segments that vanish are dropped and the others renumbered 1..K."""
        return prediction.at(resize_nearest(prediction.ids, image.shape[:2])).present()

    def tiled(self) -> Task:
        raise UserError(
            "task coco_panoptic cannot be predicted by tiles: a segment that lies in two tiles has a number in each; "
            "predict without --tiles"
        )

    def spread(self, predictions: Sequence[Segments]) -> np.ndarray:
        """The share of predictions whose class is not the most frequent one. Instances are not compared."""
        return disagreement([self._classes(segments) for segments in predictions])

    def _classes(self, segments: Segments) -> np.ndarray:
        """(H, W) classes, 0 for void."""
        table = np.zeros(max(segments.ids.max(initial=0), segments.segment_ids.max(initial=0)) + 1, np.int32)
        table[segments.segment_ids] = segments.classes
        return table[segments.ids]

    def render(self, image: np.ndarray, prediction: Segments, truth: Sample | None = None) -> dict[str, np.ndarray]:
        pictures = {"prediction": render.overlay(image, prediction, self.names, self.is_thing, self.palette)}
        if truth is not None:
            segments = truth.meta["segments"]
            pictures = {
                "ground truth": render.overlay(image, segments, self.names, self.is_thing, self.palette),
                **pictures,
            }
        return pictures

    def captions(self, prediction: Segments, truth: Sample) -> dict[str, str]:
        segments: Segments = truth.meta["segments"]
        return {"ground truth": _describe(segments), "prediction": _describe(prediction)}

    def legend(self) -> np.ndarray:
        return render.legend(self.names, self.palette)

    def prediction_legend(self, prediction: Segments) -> np.ndarray:
        return render.legend(self.names, self.palette, render.present_classes(prediction))

    def prediction_files(self, stem: str) -> dict[str, str]:
        return {"png": f"{stem}.png", "json": f"{stem}.json", "overlay": f"{stem}_overlay.png"}

    def save_prediction(self, prediction: Segments, image: np.ndarray, stem: str) -> dict[str, str]:
        """stem.png: ids as R + 256 G + 65536 B; stem.json: its segments; stem_overlay.png: names, outlines, legend."""
        paths = self.prediction_files(stem)
        write_png(paths["png"], ids_to_rgb(prediction.ids))
        area = np.bincount(prediction.ids.ravel(), minlength=len(prediction.segment_ids) + 1)
        infos = [
            {
                "id": int(number),
                "category_id": self.config.categories[int(c) - 1][0],
                "category": self.names[int(c)],
                "isthing": bool(self.is_thing[int(c)]),
                "area": int(area[number]),
            }
            for number, c in zip(prediction.segment_ids, prediction.classes, strict=True)
        ]
        write_json(Path(paths["json"]), {"segments_info": infos}, indent=1)
        picture = self.render(image, prediction)["prediction"]
        write_png(paths["overlay"], render.with_legend(picture, prediction, self.names, self.palette))
        return paths

    def baseline(self, source: SampleSource, size: int) -> Baseline:
        """The most frequent class of each pixel over `source`; the pixels of a class form one segment."""
        counts = np.zeros((size * size, len(self.names)), np.int32)
        pixels = np.arange(size * size)
        for i in range(len(source)):
            sample = source[i]
            classes = np.concatenate([[0], sample.meta["segments"].classes])
            counts[pixels, classes[resize_nearest(sample.maps["segments"], (size, size))].ravel()] += 1
        classes = counts.argmax(1).reshape(size, size)
        segments = to_segments(classes, np.zeros_like(classes), self.is_thing)
        return Baseline("most frequent class of each pixel in the training set", lambda image: segments)

    def check_sample(self, sample: Sample) -> str | None:
        """Warns about images without segments, listed segments without pixels, and areas that contradict the PNG.

        Not if stuff has fewer pixels than its area says: ADE20K's areas are those before things were laid over it.
        """
        if self.config.annotations == "instances":
            return None  # images without instances are common, and the areas are those of polygons
        truth: Segments = sample.meta["segments"]
        area = np.bincount(truth.ids.ravel(), minlength=len(truth.segment_ids) + 1)[1:]
        if not len(area):
            return f"{sample.id}: no segments (all void)"
        given = sample.meta["areas"]
        covered = (given > area) & ~self.is_thing[truth.classes]
        missing = (area == 0) & ~covered
        if missing.any():
            return f"{sample.id}: {int(missing.sum())} segments of the JSON have no pixel in {sample.meta['png']}"
        wrong = (given >= 0) & (given != area) & ~covered
        if wrong.any():
            k = int(wrong.argmax())
            return (
                f"{sample.id}: {int(wrong.sum())} areas of the JSON contradict the PNG, e.g. {given[k]} for {area[k]} "
                "pixels (scores use the pixels)"
            )
        return None

    def prepare(self, root: str, progress: Callable[[int, int], None]) -> str:
        return prepare(root, progress, self.config.annotations)

    @classmethod
    def convert(cls, root: str, out: Path | None, progress: Callable[[int, int], None]) -> str:
        """Writes the panoptic JSON and PNGs of Cityscapes or ADE20K from their original labels."""
        return convert(root, out, progress)


def _describe(segments: Segments) -> str:
    """How many segments of how many classes have pixels."""
    present = np.isin(segments.segment_ids, segments.ids)
    return f"{present.sum()} segments, {len(np.unique(segments.classes[present]))} classes"
