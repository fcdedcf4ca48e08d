"""The result writer that `Task.official` returns."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from uvim_fsq.data.resize import resize_nearest
from uvim_fsq.data.sample import Sample
from uvim_fsq.errors import UserError
from uvim_fsq.tasks.base import OfficialResults
from uvim_fsq.tasks.coco_panoptic.data import PanopticSource
from uvim_fsq.tasks.coco_panoptic.official import ResultWriter, run_panopticapi
from uvim_fsq.tasks.coco_panoptic.segments import Segments


class CocoResults(OfficialResults):
    """Writes PNGs and JSON in COCO's format and scores them with panopticapi."""

    def __init__(self, folder: Path, source: PanopticSource, category_ids: Sequence[int]) -> None:
        self.source, self.writer = source, ResultWriter(folder, category_ids)

    def add(self, prediction: Segments, sample: Sample) -> Any:
        size = (sample.image.shape[0], sample.image.shape[1])
        native = prediction.at(resize_nearest(prediction.ids, size))
        return self.writer.add(native, sample.meta["image_id"], sample.meta["png"])

    def finish(self, entries: list[Any]) -> dict[str, float]:
        predictions = self.writer.finish(entries)
        truth = self.source.unpacked_pngs()
        if truth is None:
            raise UserError(
                f"the PNGs of {self.source.annotations} are zipped, but panopticapi needs a folder; unpack them"
            )
        return run_panopticapi(self.source.annotations, truth, predictions, self.writer.pngs)
