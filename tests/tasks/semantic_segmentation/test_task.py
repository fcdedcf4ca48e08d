"""The task from its data to results, predictions and a report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.runs import save_untrained
from tests.support.small import DIRECT
from uvim_fsq.checkpoints.loading import resolve
from uvim_fsq.cli import main
from uvim_fsq.data.sample import Sample, SampleSource
from uvim_fsq.errors import UserError
from uvim_fsq.inference.predictor import Predictor
from uvim_fsq.tasks.base import Categorical
from uvim_fsq.tasks.configuration import load_run
from uvim_fsq.tasks.semantic_segmentation.task import SemanticSegmentation, SemanticSegmentationConfig

CLASSES = ((0, "road", "#ff0000"), (300, "sky", ""), (7, "void", "#00ff00"))


def task(**options: Any) -> SemanticSegmentation:
    return SemanticSegmentation(SemanticSegmentationConfig(classes=CLASSES, ignore_names=("void",), **options))


def test_labels_have_the_smallest_dtype_and_keep_missing_ones() -> None:
    sample = Sample("x", np.zeros((1, 2, 3), np.uint8), {"classes": np.array([[1, -1]], np.int32)})
    labels = task().encode(sample)["classes"]
    assert labels.tolist() == [[1, -1]] and labels.dtype == np.int8
    channel = task().label_channels["classes"]
    assert isinstance(channel, Categorical) and channel.num_classes == 2


def test_predictions_are_the_most_likely_classes_or_probabilities() -> None:
    logits = {"classes": torch.tensor([[[[0.0, 1.0], [2.0, 1.0]]]])}
    assert task().decode(logits)[0].tolist() == [[1, 0]]
    soft = task(enlarge="linear").decode({"classes": logits["classes"] + 50})[0]
    np.testing.assert_allclose(soft, logits["classes"][0].softmax(-1), atol=1e-6)
    assert task().to_size(soft, np.zeros((2, 4, 3), np.uint8)).tolist() == [[1, 1, 0, 0]] * 2
    assert task(enlarge="linear").metric(cast(SampleSource, None)).protocol == "semantic_segmentation/miou+linear"


def test_predictions_are_written_in_the_values_of_the_class_file(tmp_path: Path) -> None:
    paths = task().save_prediction(np.array([[0, 1]]), np.zeros((1, 2, 3), np.uint8), str(tmp_path / "a"))
    with Image.open(paths["png"]) as png:
        assert np.asarray(png).tolist() == [[0, 300]]


def test_pictures_show_classes_missing_labels_and_errors() -> None:
    image = np.full((1, 3, 3), 100, np.uint8)
    truth = Sample("x", image, {"classes": np.array([[0, 1, -1]], np.int32)})
    pictures = task().render(image, np.array([[0, 0, 0]]), truth)
    assert pictures["prediction"][0, 0].tolist() == [193, 40, 40]  # 0.4 x photo + 0.6 x red
    assert pictures["ground truth"][0, 2].tolist() == [100, 100, 100]
    assert pictures["error"][0, :, 0].tolist() == [0, 255, 96]


def test_the_baseline_is_the_most_frequent_class_of_a_pixel() -> None:
    truths = [[[0, 1, -1]], [[1, 1, -1]], [[0, 0, -1]], [[0, -1, -1]], [[0, 1, -1]]]
    samples = [Sample("x", np.zeros((1, 3, 3), np.uint8), {"classes": np.array(t, np.int32)}) for t in truths]
    common = task().baseline(cast(SampleSource, samples), 3).predict(np.zeros(()))
    assert common[0].tolist() == [0, 1, 0]  # where no pixel has a label, the class that is most frequent overall


def test_wrong_classes_in_the_settings_are_refused() -> None:
    for classes, message in (
        ((), "task.classes is empty"),
        (((0, "a", "red"), (1, "b", "")), "color 'red' of class 'a'; colors are written #rrggbb"),
        (((0, "a", ""), (0, "b", "")), "task.classes lists the pixel value 0 twice"),
    ):
        with pytest.raises(UserError, match=message):
            SemanticSegmentation(SemanticSegmentationConfig(classes=classes))


@pytest.mark.slow
def test_a_run_is_evaluated_with_its_confusion_matrix_and_predicts(scenes: Path, tmp_path: Path) -> None:
    options = {**DIRECT, "task": {"name": "semantic_segmentation"}}
    run = resolve(load_run(options, [f"train.out={tmp_path / 'run'}", f"data.root={scenes}"]))
    save_untrained(run)
    report = tmp_path / "page.html"
    main(["evaluate", str(tmp_path / "run"), "--baseline", "--report", str(report)])
    result = json.loads((tmp_path / "run/evaluation.json").read_text())
    names = ["box", "sphere", "cylinder", "cone", "floor", "wall", "ceiling"]
    for way in ("baseline", "direct"):
        matrix = result["matrices"][way]["confusion"]
        assert matrix["rows"] == names and np.sum(matrix["values"]) == 3 * 24 * 32
        right = 100 * np.trace(matrix["values"]) / np.sum(matrix["values"])
        assert result["figures"][way]["pixel_accuracy"] == pytest.approx(right)
    assert "confusion, shares of each row" in report.read_text()
    predictor = Predictor.from_run(tmp_path / "run")
    classes = predictor.predict(scenes / "val/images/000000.jpg")
    assert classes.shape == (24, 32) and classes.min() >= 0 and classes.max() < len(names)
