"""Scores of predicted instances, COCO's result file, and average precision by pycocotools."""

from __future__ import annotations

import contextlib
import io
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.panoptic import task_for
from tests.support.panoptic_layouts import instances_tree, write_instances
from tests.support.runs import save_untrained
from tests.support.small import ORACLE
from uvim_fsq.checkpoints.loading import resolve
from uvim_fsq.cli import main
from uvim_fsq.tasks.coco_panoptic.labels import instance_scores, panoptic_from_logits
from uvim_fsq.tasks.coco_panoptic.segments import Segments
from uvim_fsq.tasks.configuration import load_run

REASON = "needs pycocotools: pip install 'uvim-fsq[coco]'"


def test_an_instance_scores_the_mean_probability_of_its_class_and_number() -> None:
    classes = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.2, 0.6, 0.2]]).log()
    numbers = torch.tensor([[0.9, 0.1], [0.3, 0.7], [0.5, 0.5001]]).log()
    logits = classes.view(1, 1, 3, 3), numbers.view(1, 1, 3, 2)
    scores = instance_scores(*logits, *panoptic_from_logits(*logits))
    torch.testing.assert_close(scores, torch.tensor([[0.5 * 0.9, (0.8 * 0.7 + 0.6 * 0.5001 / 1.0001) / 2]]))
    shifted = logits[0] + 3, logits[1] - 40  # log-probabilities are logits too
    torch.testing.assert_close(instance_scores(*shifted, *panoptic_from_logits(*shifted)), scores)


def test_scores_stay_with_their_instances(tmp_path: Path) -> None:
    pytest.importorskip("pycocotools", reason=REASON)
    write_instances(tmp_path)
    task = task_for(tmp_path)
    generator = torch.Generator().manual_seed(0)
    logits = {
        name: 3 * torch.randn(2, 16, 16, count, generator=generator)
        for name, count in (("semantics", len(task.names)), ("instances", task.config.max_instances + 1))
    }
    for number, prediction in enumerate(task.decode(logits)):
        assert prediction.scores is not None and len(prediction.scores) == len(prediction.classes) > 2
        joint = [logits[name][number].softmax(-1) for name in ("semantics", "instances")]
        for k, segment in enumerate(prediction.segment_ids):
            inside = torch.from_numpy(prediction.ids == segment)
            (instance,) = {int(i) for i in logits["instances"][number][inside].argmax(-1)}
            mean = (joint[0][inside][:, int(prediction.classes[k])] * joint[1][inside][:, instance]).mean()
            assert prediction.scores[k] == pytest.approx(float(mean), rel=1e-4)
        small = task.to_size(prediction, np.zeros((5, 5, 3), np.uint8))
        assert small.scores is not None and set(small.scores) <= set(prediction.scores)


def guesses(root: Path) -> list[tuple[Segments, int]]:
    """Imperfect predictions with scores for the images of val."""
    rng = np.random.default_rng(0)
    task = task_for(root)
    source = task.source(str(root), "val")
    found = []
    for i in range(len(source)):
        truth = source[i].meta["segments"]
        found.append((replace(truth, ids=np.roll(truth.ids, 1 + i), scores=rng.random(len(truth.classes))), i))
    return found


def test_average_precision_is_that_of_the_files(tmp_path: Path) -> None:
    """pycocotools reads the distributed JSON and the written results by itself."""
    coco = pytest.importorskip("pycocotools.coco", reason=REASON)
    cocoeval = pytest.importorskip("pycocotools.cocoeval", reason=REASON)
    tree = instances_tree()
    for annotation in tree["annotations"]:
        annotation["id"] += 1  # COCOeval ignores matches of id 0; our own numbers begin at 1
    tree["annotations"][1]["area"] = 2000.0  # medium, whatever its mask has
    file = write_instances(tmp_path, tree)
    task = task_for(tmp_path)
    source = task.source(str(tmp_path), "val")
    writer = task.official(tmp_path / "out", source)
    entries = [writer.add(prediction, source[i]) for prediction, i in guesses(tmp_path)]
    figures = writer.finish(entries[::-1])
    with contextlib.redirect_stdout(io.StringIO()):
        truth = coco.COCO(str(file))
        official = cocoeval.COCOeval(truth, truth.loadRes(str(tmp_path / "out/instances.json")), "segm")
        official.evaluate()
        official.accumulate()
        official.summarize()
    names = ["ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"]
    names += ["ar_1", "ar_10", "ar", "ar_small", "ar_medium", "ar_large"]
    assert figures == {n: 100 * v for n, v in zip(names, official.stats, strict=True) if v >= 0}
    assert 0 < figures["ap"] < 100 and "ap_medium" in figures and "ap_large" not in figures


def test_annotations_numbered_from_zero_count(tmp_path: Path) -> None:
    pytest.importorskip("pycocotools", reason=REASON)
    tree = instances_tree()
    tree["annotations"] = [{**tree["annotations"][0], "id": 0}]
    del tree["annotations"][0]["iscrowd"], tree["annotations"][0]["area"]
    write_instances(tmp_path, tree)
    task = task_for(tmp_path)
    source = task.source(str(tmp_path), "val")
    samples = [source[i] for i in range(len(source))]
    writer = task.official(tmp_path / "out", source)
    figures = writer.finish([writer.add(sample.meta["segments"], sample) for sample in samples])
    assert figures["ap"] == pytest.approx(100) and figures["ar"] == pytest.approx(100)
    nothing = writer.finish([(sample.meta["image_id"], []) for sample in samples])
    assert nothing["ap"] == nothing["ar"] == 0 and not any(math.isnan(value) for value in nothing.values())


@pytest.mark.slow
def test_the_command_writes_results_and_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pycocotools", reason=REASON)
    write_instances(tmp_path / "coco")
    section = {"task": {"name": "coco_panoptic", "max_instances": 20, "crowd": "ignore"}}
    settings = [f"train.out={tmp_path / 'run'}", f"data.root={tmp_path / 'coco'}", "train.batch_size=2"]
    run = save_untrained(resolve(load_run({**ORACLE, **section}, settings)))
    main(["evaluate", str(run), "--official"])
    result = json.loads((run / "evaluation.json").read_text())
    assert result["protocol"] == "coco_instances/pq" and "official/ap50" in capsys.readouterr().out
    assert result["task_options"]["annotations"] == "instances"
    written = json.loads((run / "official/oracle/instances.json").read_text())
    assert {entry["image_id"] for entry in written} <= {5, 8, 11} and all(0 <= e["score"] <= 1 for e in written)
    assert "pq_stuff" not in result["figures"]["oracle"]
