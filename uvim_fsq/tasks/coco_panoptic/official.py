"""COCO's panoptic result format and its scoring program, panopticapi. Knows nothing of models or of our own score."""

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
#: Arguments: the four paths of `pq_compute`, and where its result goes (it prints much).
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
    """Writes predictions as the COCO server and panopticapi take them: `panoptic/` of id PNGs and `panoptic.json`.

    Args:
        folder: created if missing.
        category_ids: COCO's id of class 1, 2, ..., C.
    """

    def __init__(self, folder: Path, category_ids: Sequence[int]) -> None:
        self.folder, self.pngs = folder, folder / "panoptic"
        self.category_ids = [int(i) for i in category_ids]
        self.pngs.mkdir(parents=True, exist_ok=True)

    def add(self, prediction: Segments, image_id: int | str, png_name: str) -> dict[str, Any]:
        """Writes one PNG and returns its annotation; segments are renumbered 1..K, those without a pixel left out.

        Args:
            prediction: at the image's native size.
            image_id: as in the ground truth's JSON.
            png_name: of the PNG in the ground truth's folder.

        Raises:
            UserError: a pixel's id is not among the segments, or the folder cannot be written.
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
        # Plain integers: json refuses NumPy's.
        infos = [
            {"id": i, "category_id": self.category_ids[int(prediction.classes[k]) - 1]}
            for i, k in enumerate(present, start=1)
        ]
        return {"image_id": image_id, "file_name": png_name, "segments_info": infos}

    @staticmethod
    def _write_png(path: Path, ids: np.ndarray) -> None:
        # OpenCV's default is its lowest compression; naming the level turns the fast row filter off.
        ok, png = cv2.imencode(".png", cv2.cvtColor(ids_to_rgb(ids), cv2.COLOR_RGB2BGR))
        assert ok
        write_whole(path, lambda place: place.write_bytes(png.tobytes()), durable=False)

    def finish(self, entries: Iterable[dict[str, Any]]) -> Path:
        """Writes `panoptic.json` from what `add` returned (in any order) and returns its path."""
        path = self.folder / "panoptic.json"
        write_json(path, {"annotations": sorted(entries, key=lambda entry: entry["image_id"])}, indent=None)
        return path


def run_panopticapi(gt_json: Path, gt_folder: Path, pred_json: Path, pred_folder: Path) -> dict[str, float]:
    """COCO's own figures over the images of `pred_json`.

    It takes the true areas from the JSON, `PanopticMetric` from the pixels: they differ where the JSON is wrong.

    Returns:
        pq, sq, rq, and each with _things and _stuff, in percent.

    Raises:
        UserError: panopticapi is not installed, no image in common, or panopticapi's own message.
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
        # A process of its own: it forks one worker per core, which a process that uses a GPU must not.
        done = subprocess.run([sys.executable, "-c", _SCORE, *paths], capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"panopticapi cannot score {pred_json}: {_last_line(done)}")
        figures = json.loads(result.read_text())
    return {
        f"{key}{suffix}": 100.0 * figures[group][key] for group, suffix in _GROUPS.items() for key in ("pq", "sq", "rq")
    }


def _reduced_truth(gt_json: Path, pred_json: Path) -> dict[str, Any]:
    """The ground truth of the evaluated images alone; panopticapi refuses an image without a prediction."""
    truth = json.loads(gt_json.read_text())
    evaluated = {entry["image_id"] for entry in json.loads(pred_json.read_text())["annotations"]}
    annotations = [entry for entry in truth["annotations"] if entry["image_id"] in evaluated]
    if not annotations:
        raise UserError(f"{gt_json} holds no image of {pred_json}: give the annotations of the evaluated split")
    return {"categories": truth["categories"], "annotations": annotations}


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    lines = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()
    if lines[-1].startswith("ZeroDivisionError"):
        return f"{lines[-1]} (it needs at least one class of things and one of stuff in these images)"
    return lines[-1]
