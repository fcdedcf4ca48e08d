"""Panoptic labels: canonical order of instances, encoding, decoding."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from uvim_fsq.tasks.coco_panoptic.labels import (
    canonical_order,
    encode_panoptic,
    make_canonical,
    panoptic_from_logits,
    to_segments,
)


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

    def centers(numbers: np.ndarray) -> list[Fraction]:
        masks = [numbers == k for k in range(1, numbers.max() + 1) if (numbers == k).any()]
        return [Fraction(int(key[mask].sum()), int(mask.sum())) for mask in masks]

    found = centers(instances)
    assume(len(set(found)) == len(found))  # ties are broken by number
    renamed = np.concatenate([[0], rng.permutation(count) + 1, [-1]])[instances]
    first, second = make_canonical(instances), make_canonical(renamed)
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(make_canonical(first), first)
    assert centers(first) == sorted(found) and set(np.unique(first)) <= {-1, *range(len(found) + 1)}


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_instances_are_ordered_by_the_mean_key_of_their_pixels(seed: int) -> None:
    rng = np.random.default_rng(seed)
    height, width, count = rng.integers(1, 12, 3)
    segments = rng.integers(-2, count + 3, (height, width)).astype(np.int32)
    key = np.arange(width)[None] + height * np.arange(height)[:, None]
    masks = {k: segments == k for k in range(1, count + 1)}
    centers = {k: key[mask].sum() / mask.sum() for k, mask in masks.items() if mask.any()}
    order, area = canonical_order(segments, count)
    assert order.tolist() == sorted(centers, key=lambda k: (centers[k], k))
    assert area[1:].tolist() == [mask.sum() for mask in masks.values()] and area.sum() == segments.size


def test_encoding_drops_the_smallest_segments_and_unlabeled_pixels() -> None:
    segments = np.array([[4, 4, 4, 1], [2, 2, 3, 3], [2, 0, 3, 3]])
    classes = np.array([0, 9, 8, 7, 6])
    no_crowd = np.zeros(5, bool)
    labels = encode_panoptic(segments, classes, no_crowd, 10, 99, 0)
    # Ordered by center of mass: 4 is leftmost in the first row.
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
