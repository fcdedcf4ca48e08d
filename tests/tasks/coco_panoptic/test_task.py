"""The panoptic task: loss, crops, prediction files, official results."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.panoptic import task_for
from uvim_fsq.config.schema import DataConfig
from uvim_fsq.data.transforms import JointTransform
from uvim_fsq.errors import UserError
from uvim_fsq.tasks.coco_panoptic.labels import (
    make_canonical,
)
from uvim_fsq.tasks.coco_panoptic.metrics import PanopticMetric
from uvim_fsq.tasks.coco_panoptic.segments import rgb_to_ids


def test_loss_counts_unlabeled_pixels_in_the_mean_only(root: Path) -> None:
    task = task_for(root)
    logits = {n: torch.randn(1, 4, c.num_classes) for n, c in task.label_channels.items()}
    labels = {"semantics": torch.tensor([[3, 1, -1, -1]]), "instances": torch.tensor([[2, 1, -1, -1]])}
    loss, _ = task.loss(logits, labels)
    rows = [-logits[n][0].log_softmax(-1)[[0, 1], labels[n][0, :2]].sum() / 4 for n in labels]
    torch.testing.assert_close(loss[0], rows[0] + rows[1])


def test_labels_decode_to_themselves(root: Path) -> None:
    """One-hot logits of the labels at native size score 100; the trivial baseline scores less."""
    task = task_for(root)
    source = task.source(str(root), "val")
    metric = task.metric(source)
    others = task.metric(source)
    baseline = task.baseline(task.source(str(root), "train"), 16)
    for i in range(len(source)):
        sample = source[i]
        labels = task.encode(sample)
        logits = {
            name: torch.nn.functional.one_hot(torch.from_numpy(labels[name]).long(), channel.num_classes)[None].float()
            for name, channel in task.label_channels.items()
        }
        metric.update(task.decode(logits)[0], sample)
        others.update(baseline.predict(sample.image), sample)
    assert metric.compute()["pq"] == 100 and others.compute()["pq"] < 60


def test_crops_renumber_the_instances(root: Path) -> None:
    task = task_for(root)
    source = task.source(str(root), "train")
    transform = JointTransform(DataConfig(image_size=16), task, train=True)
    for seed in range(20):
        _, labels, _ = transform(source[seed % 12], seed)
        present = np.unique(labels["instances"])
        assert present.tolist() in ([*range(len(present))], [*range(1, len(present) + 1)])
        np.testing.assert_array_equal(make_canonical(labels["instances"]), labels["instances"])


def test_predictions_can_be_read_back(root: Path, tmp_path: Path) -> None:
    task = task_for(root)
    sample = task.source(str(root), "val")[0]
    big = np.zeros((240, 320, 3), np.uint8)
    prediction = task.to_size(sample.meta["segments"], big)
    paths = task.save_prediction(prediction, big, str(tmp_path / "x"))
    ids = rgb_to_ids(np.asarray(Image.open(paths["png"])))
    infos = json.loads(Path(paths["json"]).read_text())["segments_info"]
    np.testing.assert_array_equal(ids, prediction.ids)
    assert [info["area"] for info in infos] == [int((ids == info["id"]).sum()) for info in infos]
    assert {info["category"] for info in infos} <= set(task.names)
    overlay = np.asarray(Image.open(paths["overlay"]))
    assert overlay.shape[0] >= 240 and overlay.shape[1] > 320  # the legend is to its right
    assert len(np.unique(overlay[:240, :320].reshape(-1, 3), axis=0)) > len(infos)


def test_official_results_score_like_our_own(root: Path, tmp_path: Path) -> None:
    task = task_for(root)
    source = task.source(str(root), "val")
    writer = task.official(tmp_path, source)
    truth = [source[i] for i in range(len(source))]
    entries = [writer.add(sample.meta["segments"], sample) for sample in truth]
    with contextlib.suppress(UserError):  # panopticapi is not on PyPI
        assert writer.finish(entries[::-1])["pq"] == pytest.approx(100)
    written = json.loads((tmp_path / "panoptic.json").read_text())["annotations"]
    assert [entry["image_id"] for entry in written] == [sample.meta["image_id"] for sample in truth]
    assert isinstance(task.metric(source), PanopticMetric)
