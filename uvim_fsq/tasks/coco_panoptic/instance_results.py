"""Writes COCO's result format of instances and scores it with pycocotools: average precision."""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from uvim_fsq.data.resize import resize_nearest
from uvim_fsq.data.sample import Sample
from uvim_fsq.errors import UserError
from uvim_fsq.files import inside, write_json
from uvim_fsq.tasks.base import OfficialResults
from uvim_fsq.tasks.coco_panoptic.data import PanopticSource
from uvim_fsq.tasks.coco_panoptic.instances import InstanceIndex, coco_masks
from uvim_fsq.tasks.coco_panoptic.segments import Segments

#: The twelve numbers of `COCOeval.summarize`.
FIGURES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
FIGURES += ("ar_1", "ar_10", "ar", "ar_small", "ar_medium", "ar_large")


class InstanceResults(OfficialResults):
    """Writes `instances.json`, as the COCO server takes it, and computes mask AP with pycocotools.

    Args:
        folder: output folder.
        source: the evaluated split.
        category_ids: COCO's category ids of classes 1..C.
    """

    def __init__(self, folder: Path, source: PanopticSource, category_ids: Sequence[int]) -> None:
        coco_masks()
        assert isinstance(source.index, InstanceIndex)
        self.index, self.category_ids = source.index, category_ids
        self.file = folder / "instances.json"

    def add(self, prediction: Segments, sample: Sample) -> Any:
        """The results of one image. A prediction without scores counts as certain."""
        native = prediction.at(resize_nearest(prediction.ids, (sample.image.shape[0], sample.image.shape[1])))
        scores = np.ones(len(native.classes)) if native.scores is None else native.scores
        encode, results = coco_masks().encode, list[dict[str, Any]]()
        for number, c, score in zip(native.segment_ids, native.classes, scores, strict=True):
            mask = native.ids == number
            if mask.any():
                rle = encode(np.asfortranarray(mask, np.uint8))
                segmentation = {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode()}
                results.append(
                    {
                        "image_id": sample.meta["image_id"],
                        "category_id": int(self.category_ids[int(c) - 1]),
                        "segmentation": segmentation,
                        "score": float(score),
                    }
                )
        return sample.meta["image_id"], results

    def finish(self, entries: list[Any]) -> dict[str, float]:
        ordered = sorted(entries, key=lambda entry: entry[0])
        results = [result for _, found in ordered for result in found]
        write_json(inside(self.file.parent, self.file), results, indent=None)
        return average_precision(self.index, [image_id for image_id, _ in ordered], results)


def ground_truth(index: InstanceIndex, image_ids: Sequence[int | str]) -> dict[str, Any]:
    """The instances of some images in COCO's format, with all masks whole, also where others cover them."""
    row_of_image = {image_id.item(): row for row, image_id in enumerate(index.image_ids)}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id in image_ids:
        row = row_of_image[image_id]
        height, width = map(int, index.sizes[row])
        images.append({"id": image_id, "height": height, "width": width})
        for k in range(int(index.first[row]), int(index.first[row + 1])):
            annotations.append(
                {
                    "id": len(annotations) + 1,  # COCOeval takes id 0 for "not matched"
                    "image_id": image_id,
                    "category_id": int(index.category_ids[index.classes[k] - 1]),
                    "segmentation": index.rle(row, k),
                    "area": float(index.given_areas[k]),
                    "iscrowd": int(index.crowd[k]),
                }
            )
    categories = [{"id": int(category_id)} for category_id in index.category_ids]
    return {"images": images, "annotations": annotations, "categories": categories}


def average_precision(
    index: InstanceIndex, image_ids: Sequence[int | str], results: list[dict[str, Any]]
) -> dict[str, float]:
    """Mask AP and AR of `results` on the given images by `pycocotools.cocoeval`, in percent.

    `ap` and `ar` are averaged over IoU thresholds 0.5 to 0.95, with up to 100 instances per image. Figures for which
    there is no truth (e.g. no small instances) are left out. Raises UserError if pycocotools fails.
    """
    coco = importlib.import_module("pycocotools.coco").COCO
    truth = coco()
    truth.dataset = ground_truth(index, image_ids)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # they print their progress
            truth.createIndex()
            found = truth.loadRes(results) if results else coco()  # loadRes fails on an empty list
            evaluation = importlib.import_module("pycocotools.cocoeval").COCOeval(truth, found, "segm")
            evaluation.params.imgIds = list(image_ids)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
    except Exception as error:
        raise UserError(f"pycocotools cannot score the instances: {type(error).__name__}: {error}") from error
    values = zip(FIGURES, evaluation.stats, strict=True)
    return {name: 100.0 * float(value) for name, value in values if value >= 0}
