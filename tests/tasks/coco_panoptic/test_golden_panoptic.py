"""Panoptic labels and decoding equal the reference's."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from tests.support.golden import golden, golden_path
from tests.support.panoptic import read_segments, sample
from uvim_fsq.tasks.coco_panoptic.labels import (
    make_canonical,
    panoptic_from_logits,
)
from uvim_fsq.tasks.coco_panoptic.metrics import PanopticMetric


@pytest.mark.parametrize("case", range(4))
def test_canonical_instance_numbers_equal_the_references(case: int) -> None:
    arrays = golden("pipeline.npz")
    given_maps, expected = (arrays[f"make_canonical/{case}/{key}"] for key in ("in", "out"))
    np.testing.assert_array_equal(make_canonical(given_maps[..., 1]), expected[..., 1])


@pytest.mark.parametrize("case", range(3))
def test_decoded_segments_equal_the_references(case: int) -> None:
    arrays = golden("pipeline.npz")
    semantics, instances, fraction, expected = (
        arrays[f"panoptic_from_logits/{case}/{key}"] for key in ("semantics", "instances", "min_fraction", "out")
    )
    classes, chosen = panoptic_from_logits(torch.from_numpy(semantics), torch.from_numpy(instances), float(fraction))
    np.testing.assert_array_equal(torch.stack([classes, chosen], -1).numpy(), expected)


GOLDEN = golden_path("pq")


def test_panoptic_quality_equals_the_golden_scores() -> None:
    truths, guesses = (json.loads((GOLDEN / name).read_text()) for name in ("gt.json", "pred.json"))
    expected = json.loads((GOLDEN / "expected.json").read_text())
    category_ids = [c["id"] for c in truths["categories"]]
    names = [str(i) for i in category_ids]
    ours = PanopticMetric("coco_panoptic/pq", names, [bool(c["isthing"]) for c in truths["categories"]])
    guess_of = {entry["image_id"]: entry for entry in guesses["annotations"]}
    for entry in truths["annotations"]:
        guess = guess_of[entry["image_id"]]
        truth = read_segments(GOLDEN / "gt" / entry["file_name"], entry["segments_info"], category_ids)
        prediction = read_segments(GOLDEN / "pred" / guess["file_name"], guess["segments_info"], category_ids)
        ours.update(prediction, sample(truth))
    counts = np.array([[expected["counts"].get(n, {}).get(k, 0) for n in names] for k in ("iou", "tp", "fp", "fn")])
    np.testing.assert_array_equal(ours.counts[1:], counts[1:])
    np.testing.assert_allclose(ours.counts[0], counts[0], atol=1e-9)
    figures = ours.compute()
    for group, suffix in (("All", ""), ("Things", "_things"), ("Stuff", "_stuff")):
        for key in ("pq", "sq", "rq"):
            assert figures[key + suffix] == pytest.approx(100 * expected[group][key], abs=1e-9)
        assert figures[f"classes{suffix or '_all'}"] == expected[group]["n"]
    per_class = {name: value for name, value in figures.items() if name.startswith("pq/")}
    assert per_class == pytest.approx({f"pq/{n}": 100 * v["pq"] for n, v in expected["per_class"].items()}, abs=1e-9)
    assert figures["images"] == len(truths["annotations"])
