"""The task in examples/, trained, evaluated and used for prediction on synthetic photos."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.camvid import PLUGIN, camvid_data
from tests.support.paths import ROOT
from tests.support.small import LM, ORACLE
from uvim_fsq.checkpoints.loading import build_task, resolve
from uvim_fsq.commands.data_check import check_data
from uvim_fsq.data.sample import Sample
from uvim_fsq.errors import UserError
from uvim_fsq.evaluation.run import evaluate
from uvim_fsq.inference.predict_files import predict_files
from uvim_fsq.tasks.configuration import load_run
from uvim_fsq.training.run import train


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return camvid_data(tmp_path / "camvid")


@pytest.mark.slow
def test_plugin_from_configuration_to_prediction(photos: Path, tmp_path: Path) -> None:
    oracle, lm = tmp_path / "oracle", tmp_path / "lm"
    section = {"task": {"name": "camvid_segmentation"}, "plugins": [PLUGIN]}
    train(resolve(load_run({**ORACLE, **section}, [f"train.out={oracle}", f"data.root={photos}"])))
    train(resolve(load_run(LM, [f"train.out={lm}", f"oracle={oracle}"])))
    result = evaluate(lm, baseline=True)
    assert result["protocol"] == "camvid_segmentation/miou" and result["images"] == 4
    assert set(result["figures"]) == {"baseline", "oracle", "context_only", "lm"}
    assert result["figures"]["baseline"]["miou"] > 10 and "most frequent class" in result["baseline"]
    written = predict_files(lm, [str(photos / "val" / "0.jpg")], tmp_path / "out")
    with Image.open(written[0]["prediction"]) as picture:
        assert picture.size == (32, 24)


def test_mean_iou_equals_values_computed_by_hand(photos: Path) -> None:
    task = build_task(load_run({"task": {"name": "camvid_segmentation"}, "plugins": [PLUGIN]}))
    metric = task.metric(task.source(str(photos), "val"))
    truth = np.array([[0, 0, 1, 11]], np.int32)
    metric.update(np.array([[0, 1, 1, 5]]), Sample("x", np.zeros((1, 4, 3), np.uint8), {"classes": truth}))
    figures = metric.compute()
    assert figures["iou/sky"] == 50 and figures["iou/building"] == 50 and figures["miou"] == 50
    assert figures["pixel_accuracy"] == pytest.approx(200 / 3)
    with pytest.raises(UserError, match="no labeled pixel"):
        task.metric(task.source(str(photos), "val")).compute()


def test_a_tenth_of_the_training_photos_can_be_held_out(photos: Path) -> None:
    task = build_task(load_run({"task": {"name": "camvid_segmentation"}, "plugins": [PLUGIN]}))
    names = {}
    for split in ("train", "holdout", "train_minus_holdout"):
        source = task.source(str(photos), split)
        names[split] = [source[i].id for i in range(len(source))]
    assert len(names["train"]) == 10 and len(names["holdout"]) == 1
    assert sorted(names["holdout"] + names["train_minus_holdout"]) == sorted(names["train"])


def test_data_check_finds_a_missing_label_map(photos: Path) -> None:
    (photos / "valannot" / "2.png").unlink()
    lines, ok = check_data("camvid_segmentation", str(photos), [f"plugins=[{PLUGIN}]"])
    assert not ok and any("2.png cannot be read" in line for line in lines)


def test_the_package_does_not_mention_the_example() -> None:
    files = subprocess.run(["git", "ls-files", "uvim_fsq"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    files = files or [str(path.relative_to(ROOT)) for path in (ROOT / "uvim_fsq").rglob("*.py")]
    assert len(files) > 20
    assert not [file for file in files if "camvid_segmentation" in (ROOT / file).read_text(errors="replace").lower()]


def test_the_examples_configurations_are_valid() -> None:
    for name in ("oracle", "lm"):
        run = load_run(ROOT / f"examples/camvid_segmentation/{name}.yaml")
        assert run.train.steps and run.stage == name
    source = (ROOT / "examples/camvid_segmentation/camvid_segmentation.py").read_text()
    assert len(source.splitlines()) < 130
