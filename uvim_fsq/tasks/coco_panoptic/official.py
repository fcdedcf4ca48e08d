"""Writes COCO's panoptic result format and runs its scoring program, panopticapi."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from uvim_fsq.errors import UserError
from uvim_fsq.files import inside, write_json, write_whole
from uvim_fsq.tasks.coco_panoptic.segments import Segments, ids_to_rgb, segment_index

_GROUPS = {"All": "", "Things": "_things", "Stuff": "_stuff"}
#: Arguments: the four paths for `pq_compute`, and a file for its result (its output is verbose).
_SCORE = """
import sys
if sys.path[0] == "":
    del sys.path[0]  # the current folder
import json
from panopticapi.evaluation import pq_compute
result = pq_compute(*sys.argv[1:5])
with open(sys.argv[5], "w") as file:
    json.dump({group: result[group] for group in ("All", "Things", "Stuff")}, file)
"""


class ResultWriter:
    """Writes predictions for the COCO server and panopticapi: `panoptic/`, a folder of id PNGs, and `panoptic.json`.

    Args:
        folder: output folder; created if missing.
        category_ids: COCO's category ids of classes 1..C.
    """

    def __init__(self, folder: Path, category_ids: Sequence[int]) -> None:
        self.folder, self.pngs = folder, folder / "panoptic"
        self.category_ids = [int(i) for i in category_ids]
        self.pngs.mkdir(parents=True, exist_ok=True)

    def add(self, prediction: Segments, image_id: int | str, png_name: str) -> dict[str, Any]:
        """Writes one PNG and returns its annotation. Segments are renumbered 1..K; those without pixels are dropped.

        Args:
            prediction: at the image's native size.
            image_id: the id in the ground-truth JSON.
            png_name: the name of the ground-truth PNG.

        Raises:
            UserError: a pixel's id is not among the segments, or the folder is not writable.
        """
        index = segment_index(prediction.ids, prediction.segment_ids)
        if index.min(initial=0) < 0:
            unknown = prediction.ids[index < 0][0]
            raise UserError(f"{png_name}: the prediction holds segment id {unknown} that is not among its segments")
        area = np.bincount(index.ravel(), minlength=len(prediction.segment_ids) + 1)
        present = np.flatnonzero(area[1:])
        number = np.zeros(len(area), np.int32)
        number[present + 1] = np.arange(1, len(present) + 1)
        self._write_png(inside(self.pngs, self.pngs / png_name), number.take(index))
        # Convert to int, because json cannot write NumPy integers.
        infos = [
            {"id": i, "category_id": self.category_ids[int(prediction.classes[k]) - 1]}
            for i, k in enumerate(present, start=1)
        ]
        return {"image_id": image_id, "file_name": png_name, "segments_info": infos}

    @staticmethod
    def _write_png(path: Path, ids: np.ndarray) -> None:
        # Keep OpenCV's default (lowest) compression: setting a level explicitly disables its fast row filter.
        ok, png = cv2.imencode(".png", cv2.cvtColor(ids_to_rgb(ids), cv2.COLOR_RGB2BGR))
        assert ok
        write_whole(path, lambda place: place.write_bytes(png.tobytes()), durable=False)

    def finish(self, entries: Iterable[dict[str, Any]]) -> Path:
        """Writes `panoptic.json` from the annotations that `add` returned, in any order, and returns its path."""
        path = self.folder / "panoptic.json"
        write_json(path, {"annotations": sorted(entries, key=lambda entry: entry["image_id"])}, indent=None)
        return path


def run_panopticapi(gt_json: Path, gt_folder: Path, pred_json: Path, pred_folder: Path) -> dict[str, float]:
    """Scores the images of `pred_json` with panopticapi.

    It takes the true areas from the JSON, whereas `PanopticMetric` counts pixels; they differ if the JSON is wrong.

    Returns:
        pq, sq, rq, and each with _things and _stuff, in percent.

    Raises:
        UserError: panopticapi is not installed or fails, or the two JSON files have no image in common.
    """
    if importlib.util.find_spec("panopticapi") is None:
        raise UserError(
            "panopticapi is not installed (pip install git+https://github.com/cocodataset/panopticapi.git); "
            f"{pred_json} and its PNGs are ready for it"
        )
    with tempfile.TemporaryDirectory() as name:
        reduced, result = Path(name) / "truth.json", Path(name) / "result.json"
        reduced.write_text(json.dumps(_reduced_truth(gt_json, pred_json)))
        paths = [str(path) for path in (reduced, pred_json, gt_folder, pred_folder, result)]
        # A separate process, because it forks one worker per core, and a process that uses a GPU must not fork.
        done = subprocess.run([sys.executable, "-c", _SCORE, *paths], capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"panopticapi cannot score {pred_json}: {_last_line(done)}")
        figures = json.loads(result.read_text())
    return {
        f"{key}{suffix}": 100.0 * figures[group][key] for group, suffix in _GROUPS.items() for key in ("pq", "sq", "rq")
    }


def _reduced_truth(gt_json: Path, pred_json: Path) -> dict[str, Any]:
    """The ground truth restricted to the evaluated images; panopticapi refuses images without a prediction."""
    truth = json.loads(gt_json.read_text())
    evaluated = {entry["image_id"] for entry in json.loads(pred_json.read_text())["annotations"]}
    annotations = [entry for entry in truth["annotations"] if entry["image_id"] in evaluated]
    if not annotations:
        raise UserError(f"{gt_json} has no image of {pred_json}: use the annotations of the evaluated split")
    return {"categories": truth["categories"], "annotations": annotations}


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    lines = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()
    if lines[-1].startswith("ZeroDivisionError"):
        return f"{lines[-1]} (it needs at least one class of things and one of stuff in these images)"
    return lines[-1]
