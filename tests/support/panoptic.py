"""Helpers of the panoptic tests: the task of a data set, changes to its annotations, random segments."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from uvim_fsq.data.sample import Sample
from uvim_fsq.tasks.coco_panoptic.metrics import PanopticMetric
from uvim_fsq.tasks.coco_panoptic.segments import MAX_ID, Segments, rgb_to_ids
from uvim_fsq.tasks.coco_panoptic.task import CocoPanoptic, CocoPanopticConfig

CONFIG = CocoPanopticConfig()


def task_for(root: Path, **options: Any) -> CocoPanoptic:
    return CocoPanoptic(CocoPanoptic.resolve_config(CocoPanopticConfig(**options), str(root)))


def edit(root: Path, change: Any, split: str = "val") -> None:
    """Applies `change` to the parsed annotation file."""
    file = root / f"annotations/panoptic_{split}2017.json"
    tree = json.loads(file.read_text())
    change(tree)
    file.write_text(json.dumps(tree))


CLASSES = 5


CATEGORY_IDS = [3, 7, 8, 90, 200]


IS_THING = [True, True, False, True, False]


KINDS = ("regions", "noise", "empty prediction", "void truth", "one class", "crowds", "many")


CASES = [(kind, seed) for kind in KINDS for seed in range(4 if kind == "many" else 12)]


def segments(ids: Any, *rows: tuple[int, int, bool]) -> Segments:
    """Segments of a map of ids and rows (id, class, crowd)."""
    table = np.array(rows, np.int64).reshape(-1, 3)
    return Segments(np.array(ids, np.int32), table[:, 0], table[:, 1].astype(np.int32), table[:, 2].astype(bool))


def random_case(kind: str, seed: int) -> tuple[Segments, Segments]:
    """Prediction and truth: coarse regions, the prediction's shifted, relabeled and sprinkled with noise."""
    rng = np.random.default_rng([KINDS.index(kind), seed])
    height, width = rng.integers(9, 60, 2)
    num = 150 if kind == "many" else int(rng.integers(1, 12))
    cell = 1 if kind in ("noise", "many") else int(rng.integers(4, 16))
    coarse = rng.integers(0, num + 1, (height // cell + 1, width // cell + 1))
    truth = np.kron(coarse, np.ones((cell, cell), int))[:height, :width] * (kind != "void truth")
    predicted = np.roll(truth if kind != "void truth" else rng.integers(0, num + 1, truth.shape), rng.integers(3))
    noise = rng.random(truth.shape) < rng.choice([0.0, 0.1, 0.4])
    predicted = np.where(noise, rng.integers(0, num + 1, truth.shape), predicted) * (kind != "empty prediction")
    high = 2 if kind == "one class" else CLASSES + 1
    classes = rng.integers(1, high, num + 1).astype(np.int32)
    wrong = rng.random(num + 1) < 0.2
    guesses = np.where(wrong, rng.integers(1, high, num + 1), classes).astype(np.int32)
    crowd = rng.random(num + 1) < (0.6 if kind == "crowds" else 0.1)
    true_ids = np.concatenate([[0], rng.choice(MAX_ID, num, replace=False) + 1])
    order = rng.permutation(num) + 1
    return (
        Segments(predicted.astype(np.int32), np.arange(1, num + 1), guesses[1:], np.zeros(num, bool)),
        Segments(true_ids[truth].astype(np.int32), true_ids[order], classes[order], crowd[order]),
    )


def sample(truth: Segments, name: str = "x") -> Sample:
    return Sample(name, np.zeros((*truth.ids.shape, 3), np.uint8), meta={"segments": truth})


def metric() -> PanopticMetric:
    return PanopticMetric("coco_panoptic/pq", [f"c{i}" for i in CATEGORY_IDS], IS_THING)


def read_segments(png: Path, infos: list[dict[str, Any]], category_ids: list[int]) -> Segments:
    rows = [(info["id"], category_ids.index(info["category_id"]) + 1, info.get("iscrowd", 0)) for info in infos]
    return segments(rgb_to_ids(np.asarray(Image.open(png))), *rows)
