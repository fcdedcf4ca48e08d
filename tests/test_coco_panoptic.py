"""Panoptic labels, predictions, adapter and everything that can be wrong with a data set in the COCO format."""

from __future__ import annotations

import contextlib
import json
import pickle
import shutil
import warnings
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.support.golden import golden
from tests.support.panoptic import CONFIG, edit, task_for
from uvim_fsq.config.schema import DataConfig
from uvim_fsq.data.transforms import JointTransform
from uvim_fsq.errors import UserError
from uvim_fsq.tasks.coco_panoptic.data import open_source, prepare
from uvim_fsq.tasks.coco_panoptic.labels import (
    canonical_order,
    encode_panoptic,
    make_canonical,
    panoptic_from_logits,
    to_segments,
)
from uvim_fsq.tasks.coco_panoptic.metrics import PanopticMetric
from uvim_fsq.tasks.coco_panoptic.segments import rgb_to_ids
from uvim_fsq.tasks.coco_panoptic.task import CocoPanoptic


@pytest.fixture
def root(coco_scenes: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(coco_scenes, tmp_path / "coco"))


# ---------------------------------------------------------------- labels and predictions


@pytest.mark.parametrize("case", range(4))
def test_make_canonical_golden(case: int) -> None:
    arrays = golden("pipeline.npz")
    given_maps, expected = (arrays[f"make_canonical/{case}/{key}"] for key in ("in", "out"))
    np.testing.assert_array_equal(make_canonical(given_maps[..., 1]), expected[..., 1])


@pytest.mark.parametrize("case", range(3))
def test_panoptic_from_logits_golden(case: int) -> None:
    arrays = golden("pipeline.npz")
    semantics, instances, fraction, expected = (
        arrays[f"panoptic_from_logits/{case}/{key}"] for key in ("semantics", "instances", "min_fraction", "out")
    )
    classes, chosen = panoptic_from_logits(torch.from_numpy(semantics), torch.from_numpy(instances), float(fraction))
    np.testing.assert_array_equal(torch.stack([classes, chosen], -1).numpy(), expected)


def test_min_fraction_is_inclusive() -> None:
    instances = torch.zeros(1, 2, 4, 3)
    instances[0, 0, :2, 1] = 1  # 2 of 8 pixels are instance 1, the rest instance 0
    semantics = torch.zeros(1, 2, 4, 3)
    semantics[..., 2] = 1
    kept, _ = panoptic_from_logits(semantics, instances, 0.24)
    void, _ = panoptic_from_logits(semantics, instances, 0.25)
    assert kept.unique().tolist() == [2]
    assert void[0, 0].tolist() == [0, 0, 2, 2]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 9))
def test_canonical_order_does_not_depend_on_the_numbers(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    instances = rng.integers(-1, count + 1, (7, 11))
    y, x = np.mgrid[: instances.shape[0], : instances.shape[1]]
    key = x + instances.shape[0] * y

    def centres(numbers: np.ndarray) -> list[Fraction]:
        masks = [numbers == k for k in range(1, numbers.max() + 1) if (numbers == k).any()]
        return [Fraction(int(key[mask].sum()), int(mask.sum())) for mask in masks]

    found = centres(instances)
    assume(len(set(found)) == len(found))  # of segments with one centre the lower number comes first
    renamed = np.concatenate([[0], rng.permutation(count) + 1, [-1]])[instances]
    first, second = make_canonical(instances), make_canonical(renamed)
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(make_canonical(first), first)
    assert centres(first) == sorted(found) and set(np.unique(first)) <= {-1, *range(len(found) + 1)}


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_order_is_that_of_the_mean_key_of_all_pixels(seed: int) -> None:
    rng = np.random.default_rng(seed)
    height, width, count = rng.integers(1, 12, 3)
    segments = rng.integers(-2, count + 3, (height, width)).astype(np.int32)
    key = np.arange(width)[None] + height * np.arange(height)[:, None]
    masks = {k: segments == k for k in range(1, count + 1)}
    centres = {k: key[mask].sum() / mask.sum() for k, mask in masks.items() if mask.any()}
    order, area = canonical_order(segments, count)
    assert order.tolist() == sorted(centres, key=lambda k: (centres[k], k))
    assert area[1:].tolist() == [mask.sum() for mask in masks.values()] and area.sum() == segments.size


def test_encode_drops_the_smallest_and_the_unlabelled() -> None:
    segments = np.array([[4, 4, 4, 1], [2, 2, 3, 3], [2, 0, 3, 3]])
    classes = np.array([0, 9, 8, 7, 6])
    no_crowd = np.zeros(5, bool)
    labels = encode_panoptic(segments, classes, no_crowd, 10, 99, 0)
    # Centres of mass: 4 lies leftmost in the first row.
    np.testing.assert_array_equal(labels["instances"], [[1, 1, 1, 2], [3, 3, 4, 4], [3, 0, 4, 4]])
    np.testing.assert_array_equal(labels["semantics"], [[6, 6, 6, 9], [8, 8, 7, 7], [8, 0, 7, 7]])
    fewer = encode_panoptic(segments, classes, no_crowd, 10, 3, -1)
    np.testing.assert_array_equal(fewer["instances"], [[1, 1, 1, -1], [2, 2, 3, 3], [2, -1, 3, 3]])
    np.testing.assert_array_equal(fewer["semantics"], [[6, 6, 6, -1], [8, 8, 7, 7], [8, -1, 7, 7]])
    crowd = encode_panoptic(segments, classes, np.arange(5) == 3, 10, 99, 0)
    np.testing.assert_array_equal(crowd["instances"], [[1, 1, 1, 2], [3, 3, -1, -1], [3, 0, -1, -1]])


def test_stuff_of_one_class_is_one_segment() -> None:
    semantics = np.array([[1, 1, 2, 2], [0, 2, 1, 1]])
    instances = np.array([[5, 5, 3, 3], [0, 4, 6, 6]])
    segments = to_segments(semantics, instances, np.array([False, True, False]))
    assert segments.segment_ids.tolist() == [1, 2, 3] and segments.classes.tolist() == [1, 1, 2]
    np.testing.assert_array_equal(segments.ids, [[1, 1, 3, 3], [0, 3, 2, 2]])


def test_loss_counts_unlabelled_pixels_in_the_mean_only(root: Path) -> None:
    task = task_for(root)
    logits = {n: torch.randn(1, 4, c.num_classes) for n, c in task.label_channels.items()}
    labels = {"semantics": torch.tensor([[3, 1, -1, -1]]), "instances": torch.tensor([[2, 1, -1, -1]])}
    loss, _ = task.loss(logits, labels)
    rows = [-logits[n][0].log_softmax(-1)[[0, 1], labels[n][0, :2]].sum() / 4 for n in labels]
    torch.testing.assert_close(loss[0], rows[0] + rows[1])


def test_labels_decode_to_themselves(root: Path) -> None:
    """Labels as certain logits, at native size, score 100; the trivial baseline less."""
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


# ---------------------------------------------------------------- adapter


def ids_of(root: Path, split: str) -> set[str]:
    source = open_source(str(root), split, CONFIG)
    return {source[i].id for i in range(len(source))}


def test_splits_are_disjoint_and_fixed(root: Path) -> None:
    held, rest, train = (ids_of(root, split) for split in ("holdout", "train_minus_holdout", "train"))
    assert len(held) == 1 and held | rest == train and not held & rest
    assert held == ids_of(root, "holdout") and len(ids_of(root, "val")) == 4


@pytest.mark.parametrize("place", ["annotations", "beside the photos", "zip"])
def test_pngs_in_all_three_places(root: Path, place: str) -> None:
    expected = [open_source(str(root), "val", CONFIG)[i].maps["segments"] for i in range(4)]
    pngs = root / "annotations/panoptic_val2017"
    if place == "beside the photos":
        pngs.rename(root / "panoptic_val2017")
    elif place == "zip":
        shutil.make_archive(str(pngs), "zip", pngs.parent, pngs.name)
        shutil.rmtree(pngs)
    source = pickle.loads(pickle.dumps(open_source(str(root), "val", CONFIG)))
    for i, segments in enumerate(expected):
        np.testing.assert_array_equal(source[i].maps["segments"], segments)
    assert pickle.loads(pickle.dumps(source))[0].id == source[0].id
    assert (source.unpacked_pngs() is None) == (place == "zip")


def test_truth_agrees_with_the_png(root: Path) -> None:
    source = open_source(str(root), "val", CONFIG)
    tree = json.loads((root / "annotations/panoptic_val2017.json").read_text())
    for i, annotation in enumerate(tree["annotations"]):
        ids = rgb_to_ids(np.asarray(Image.open(root / "annotations/panoptic_val2017" / annotation["file_name"])))
        listed = np.array([0, *(info["id"] for info in annotation["segments_info"])])
        sample = source[i]
        np.testing.assert_array_equal(listed[sample.maps["segments"]], ids)
        categories = [c["id"] for c in tree["categories"]]
        wanted = [categories.index(info["category_id"]) + 1 for info in annotation["segments_info"]]
        assert sample.meta["segments"].classes.tolist() == wanted


def test_prepared_labels_are_the_same(root: Path) -> None:
    before = [open_source(str(root), "train", CONFIG)[i].maps["segments"] for i in range(12)]
    seen: list[tuple[int, int]] = []
    assert "12 train and 4 val" in prepare(str(root), lambda done, total: seen.append((done, total)))
    source = open_source(str(root), "train", CONFIG)
    assert "prepared" in source.info["layout"] and (12, 12) in seen
    for i, segments in enumerate(before):
        np.testing.assert_array_equal(source[i].maps["segments"], segments)
    edit(root, lambda tree: tree["annotations"].pop(), "train")
    with pytest.raises(UserError, match="prepared from a different"):
        open_source(str(root), "train", CONFIG)


def test_categories_come_from_the_file_and_must_agree(root: Path) -> None:
    task = task_for(root)
    assert [name for _, name, _ in task.config.categories] == task.names[1:]
    assert task.label_channels["semantics"].num_classes == len(task.names)
    edit(root, lambda tree: tree["categories"][0].update(name="another"))
    with pytest.raises(UserError, match="different categories"):
        task.source(str(root), "val")
    with pytest.raises(UserError, match="categories is empty"):
        CocoPanoptic(CONFIG)


def test_many_segments_are_counted_and_warned_of(root: Path) -> None:
    with pytest.warns(UserWarning, match="more than 2 segments"):
        source = open_source(str(root), "val", replace(CONFIG, max_instances=2))
    assert source.info["images_over_2_segments"] >= 1
    task = task_for(root, max_instances=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sample = task.source(str(root), "val")[0]
    assert set(np.unique(task.encode(sample)["instances"])) <= {-1, 0, 1, 2}


def test_crop_renumbers(root: Path) -> None:
    task = task_for(root)
    source = task.source(str(root), "train")
    transform = JointTransform(DataConfig(image_size=16), task, train=True)
    for seed in range(20):
        _, labels, _ = transform(source[seed % 12], seed)
        present = np.unique(labels["instances"])
        assert present.tolist() in ([*range(len(present))], [*range(1, len(present) + 1)])
        np.testing.assert_array_equal(make_canonical(labels["instances"]), labels["instances"])


# ---------------------------------------------------------------- bad input


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
    assert overlay.shape[0] >= 240 and overlay.shape[1] > 320  # the legend stands beside it
    assert len(np.unique(overlay[:240, :320].reshape(-1, 3), axis=0)) > len(infos)


def test_official_results_score_like_our_own(root: Path, tmp_path: Path) -> None:
    task = task_for(root)
    source = task.source(str(root), "val")
    writer = task.official(tmp_path, source)
    truth = [source[i] for i in range(len(source))]
    entries = [writer.add(sample.meta["segments"], sample) for sample in truth]
    with contextlib.suppress(UserError):  # panopticapi is on no registry
        assert writer.finish(entries[::-1])["pq"] == pytest.approx(100)
    written = json.loads((tmp_path / "panoptic.json").read_text())["annotations"]
    assert [entry["image_id"] for entry in written] == [sample.meta["image_id"] for sample in truth]
    assert isinstance(task.metric(source), PanopticMetric)
