"""Panoptic quality equals an independent, slow implementation and values computed by hand."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from tests.support.panoptic import (
    CASES,
    CLASSES,
    metric,
    random_case,
    sample,
    segments,
)
from uvim_fsq.data.resize import resize_nearest
from uvim_fsq.errors import UserError
from uvim_fsq.tasks.coco_panoptic.metrics import PanopticMetric, count_matches
from uvim_fsq.tasks.coco_panoptic.segments import Segments


def slow_counts(prediction: Segments, truth: Segments) -> np.ndarray:
    """arXiv 1801.00868, section 4.1 and COCO's crowd rule, mask by mask. Independent of the package's functions."""
    counts = np.zeros((4, CLASSES))
    void = truth.ids == 0
    guesses = [(prediction.ids == i, int(c)) for i, c in zip(prediction.segment_ids, prediction.classes, strict=True)]
    found: set[int] = set()
    crowds: dict[int, np.ndarray] = {}
    for i, c, is_crowd in zip(truth.segment_ids, truth.classes, truth.crowd, strict=True):
        mask, matched = truth.ids == i, False
        if is_crowd:
            crowds[int(c)] = mask
            continue
        for k, (guess, label) in enumerate(guesses):
            shared, union = (mask & guess).sum(), (mask | (guess & ~void)).sum()
            if label == c and shared and shared / union > 0.5:
                counts[0, c - 1] += shared / union
                counts[1, c - 1] += 1
                matched = True
                found.add(k)
        counts[3, c - 1] += not matched
    for k, (guess, label) in enumerate(guesses):
        forgiven = void | crowds.get(label, void)
        if guess.any() and k not in found and (guess & forgiven).sum() / guess.sum() <= 0.5:
            counts[2, label - 1] += 1
    return counts


@functools.cache
def reference(kind: str, seed: int) -> np.ndarray:
    return slow_counts(*random_case(kind, seed))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "seed"), CASES)
def test_counts_equal_the_slow_reference(kind: str, seed: int) -> None:
    prediction, truth = random_case(kind, seed)
    counts, expected = count_matches(prediction, truth, CLASSES), reference(kind, seed)
    np.testing.assert_array_equal(counts[1:], expected[1:])
    np.testing.assert_allclose(counts[0], expected[0], atol=1e-12)


def test_the_cases_exercise_every_rule() -> None:
    total = np.sum([reference(*case) for case in CASES], axis=0)
    assert (total[1:].sum(1) > 50).all()
    predicted = [len(np.unique(random_case(*case)[0].ids)) - 1 for case in CASES]
    forgiven = [n - reference(*case)[1:3].sum() for n, case in zip(predicted, CASES, strict=True)]
    assert sum(n > 0 for n in forgiven) > 20


def test_void_is_left_out_of_the_union_and_exactly_half_is_no_match() -> None:
    prediction = segments([[1, 1, 1, 1]], (1, 1, False))
    np.testing.assert_array_equal(
        count_matches(prediction, segments([[9, 9, 0, 0]], (9, 1, False)), 1).T, [[1, 1, 0, 0]]
    )
    # An IoU of exactly 0.5 is no match; a segment that is exactly half void still counts as a false positive.
    np.testing.assert_array_equal(
        count_matches(prediction, segments([[9, 9, 8, 8]], (9, 1, False), (8, 1, True)), 1).T, [[0, 0, 1, 1]]
    )


def test_only_the_last_listed_crowd_of_a_class_excuses_false_positives() -> None:
    prediction, rows = segments([[1, 1, 1, 1]], (1, 1, False)), [(5, 1, True), (6, 1, True)]
    for listed, false_positives in ((rows, 1), (rows[::-1], 0)):
        assert count_matches(prediction, segments([[5, 5, 5, 6]], *listed), 1)[2, 0] == false_positives


def test_segments_without_pixels_count_only_as_missed_truth() -> None:
    prediction, truth = segments([[0, 0]], (1, 1, False)), segments([[4, 4]], (4, 1, False), (6, 2, False))
    np.testing.assert_array_equal(count_matches(prediction, truth, 2), [[0, 0], [0, 0], [0, 0], [1, 1]])
    nothing = segments([[0, 0]])
    np.testing.assert_array_equal(count_matches(nothing, truth, 2), [[0, 0], [0, 0], [0, 0], [1, 1]])
    assert not count_matches(nothing, nothing, 2).any() and not count_matches(prediction, nothing, 2).any()
    assert metric().update(nothing, sample(nothing)) == {"pq": 0.0, "segments_gt": 0.0, "segments_pred": 0.0}


def test_metric_states_of_several_processes_add_up() -> None:
    cases = [random_case(kind, seed) for kind, seed in CASES]
    whole, halves = metric(), (metric(), metric())
    for i, (prediction, truth) in enumerate(cases):
        row = whole.update(prediction, sample(truth))
        assert row == halves[i % 2].update(prediction, sample(truth))
        assert 0 <= row["pq"] <= 100 and row["segments_gt"] == (~truth.crowd).sum()
        assert row["segments_pred"] == len(np.unique(prediction.ids[prediction.ids > 0]))
    states = [half.state() for half in halves]
    total = metric()
    total.load_state({name: np.sum([state[name] for state in states], axis=0) for name in states[0]})
    assert total.compute() == pytest.approx(whole.compute(), abs=1e-9)
    assert whole.state()["images"].tolist() == [len(cases)]
    assert whole.state()["counts"].shape == (4, CLASSES) and whole.compute()["images"] == len(cases)


def test_a_perfect_prediction_scores_100() -> None:
    _, truth = random_case("regions", 1)
    truth = Segments(truth.ids, truth.segment_ids, truth.classes, np.zeros_like(truth.crowd))
    present = np.isin(truth.segment_ids, truth.ids)
    truth = Segments(truth.ids, truth.segment_ids[present], truth.classes[present], truth.crowd[present])
    ours = metric()
    assert ours.update(truth, sample(truth))["pq"] == 100
    assert ours.compute()["pq"] == ours.compute()["sq"] == ours.compute()["rq"] == 100


def test_predictions_of_another_size_are_resized_and_vanished_segments_dropped() -> None:
    prediction, truth = random_case("regions", 3)
    small = Segments(
        resize_nearest(prediction.ids, (8, 11)), prediction.segment_ids, prediction.classes, prediction.crowd
    )
    back = Segments(resize_nearest(small.ids, truth.ids.shape), small.segment_ids, small.classes, small.crowd)
    ours = metric()
    ours.update(small, sample(truth))
    np.testing.assert_array_equal(ours.counts, count_matches(back, truth, CLASSES))
    ids = np.ones((4, 100), np.int32)
    ids[0, 0] = 2
    row = ours.update(segments(ids, (1, 1, False), (2, 2, False)), sample(segments([[7, 7]], (7, 1, False))))
    assert row == {"pq": 100.0, "segments_gt": 1.0, "segments_pred": 1.0}


def test_groups_without_classes_and_without_occurrences() -> None:
    truth = segments([[1]], (1, 1, False))
    things = PanopticMetric("p", ["a", "b"], [True, True])
    things.update(truth, sample(truth))
    assert set(things.compute()) == {
        *("pq", "sq", "rq", "classes_all"),
        *("pq_things", "sq_things", "rq_things", "classes_things"),
        *("images", "pq/a"),
    }
    both = PanopticMetric("p", ["a", "b"], [True, False])
    both.update(truth, sample(truth))
    assert both.compute()["pq_stuff"] == both.compute()["classes_stuff"] == 0
    assert both.compute()["pq_things"] == both.compute()["pq"] == 100
    with pytest.raises(UserError, match="no image was evaluated"):
        metric().compute()


@pytest.mark.parametrize(
    ("prediction", "truth", "message"),
    [
        (segments([[0]]), segments([[70000]], (5, 1, False)), "img.jpg: PNG holds segment id 70000 that the JSON"),
        (segments([[0]]), segments([[-5]], (5, 1, False)), "img.jpg: PNG holds segment id -5 that the JSON"),
        (segments([[3]], (1, 1, False)), segments([[0]]), "the prediction holds segment id 3 "),
        (segments([[0]]), segments([[1]], (1, 9, False)), "the ground truth holds class 9"),
        (segments([[1]], (1, 6, False)), segments([[0]]), "the prediction holds class 6, but the classes are 1..5"),
        (segments([[1]], (1, 0, False)), segments([[0]]), "the prediction holds class 0"),
        (segments([[0]]), segments([[1]], (1, 1, False), (1, 2, False)), "segment id 1 is listed twice"),
        (segments([[0]]), segments([[1]], (0, 1, False), (1, 2, False)), "segment id 0 is listed"),
    ],
)
def test_inconsistent_segments_are_refused(prediction: Segments, truth: Segments, message: str) -> None:
    ours = metric()
    with pytest.raises(UserError, match=message) as error:
        ours.update(prediction, sample(truth, "img.jpg"))
    assert "\n" not in str(error.value) and not ours.images.any()
