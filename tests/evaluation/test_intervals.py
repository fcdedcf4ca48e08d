"""Paired bootstrap intervals of metric differences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.small import TASKS
from uvim_fsq.data.sample import Array, Sample
from uvim_fsq.errors import UserError
from uvim_fsq.evaluation import intervals
from uvim_fsq.evaluation.intervals import ImageStates, Interval, interval, read_states, resampled, write_states
from uvim_fsq.evaluation.run import evaluate
from uvim_fsq.tasks.base import Metric


class Ratio(Metric):
    """A ratio of sums, which no mean of per-image values equals."""

    protocol = "ratio"

    def __init__(self) -> None:
        self.sums = np.zeros(2)

    def update(self, prediction: tuple[float, float], sample: object) -> dict[str, float]:
        self.sums += prediction
        return {}

    def state(self) -> dict[str, Array]:
        return {"sums": self.sums.copy()}

    def load_state(self, state) -> None:
        self.sums = np.array(state["sums"])

    def compute(self) -> dict[str, float]:
        return {"ratio": float(self.sums[0] / self.sums[1])}


def recorded(values: Array, ids: list[str] | None = None) -> ImageStates:
    metric, states = Ratio(), ImageStates()
    for i, value in enumerate(values):
        before = metric.state()
        metric.update(tuple(value), None)
        states.add(ids[i] if ids else f"{i:04d}", before, metric.state())
    return states


def paired_bootstrap(*pairs: tuple[intervals.Stacked, intervals.Stacked], **settings: int) -> Interval:
    drawn = [[resampled(Ratio(), "ratio", states, **settings) for states in pair] for pair in pairs]
    return interval([(first, second) for first, second in drawn])


def interval_of(first: Array, second: Array, folder: Path, **settings: int) -> Interval:
    file = folder / "x.npz"
    write_states(file, {"a": recorded(first).stacked(), "b": recorded(second).stacked()})
    return paired_bootstrap((read_states(file, "a"), read_states(file, "b")), **settings)


def test_the_difference_is_that_of_the_metric_and_not_of_means_over_images(tmp_path: Path) -> None:
    first, second = np.array([[1.0, 1.0], [1.0, 9.0]]), np.array([[1.0, 2.0], [0.0, 8.0]])
    assert interval_of(first, second, tmp_path).difference == pytest.approx(2 / 10 - 1 / 10)


def test_the_deviation_of_a_mean_difference_is_the_standard_error(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    shared = rng.normal(size=400) * 10  # the same for both, so a paired interval does not contain it
    gap = rng.normal(0.3, 1.0, size=400)
    first, second = (np.stack([x, np.ones(400)], 1) for x in (shared + gap, shared))
    found = interval_of(first, second, tmp_path, resamples=2000)
    error = gap.std(ddof=1) / 20
    assert found.difference == pytest.approx(gap.mean())
    assert found.deviation == pytest.approx(error, rel=0.08)
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.08)
    assert found.excludes_zero


def test_the_difference_of_several_pairs_is_their_mean(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values = [np.stack([rng.normal(size=200), np.ones(200)], 1) for _ in range(4)]
    states = [recorded(x).stacked() for x in values]
    found = paired_bootstrap((states[0], states[1]), (states[2], states[3]), resamples=2000)
    gaps = (values[0] - values[1] + values[2] - values[3])[:, 0] / 2
    assert found.difference == pytest.approx(gaps.mean())
    assert found.deviation == pytest.approx(gaps.std(ddof=1) / np.sqrt(200), rel=0.08)


def test_equal_predictions_have_no_difference(tmp_path: Path) -> None:
    values = np.random.default_rng(0).uniform(1, 2, (30, 2))
    found = interval_of(values, values, tmp_path)
    assert found == Interval(0.0, 0.0, 0.0, 0.0) and not found.excludes_zero


def test_the_order_of_the_images_does_not_matter(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    first, second = rng.uniform(1, 2, (20, 2)), rng.uniform(1, 2, (20, 2))
    ids = [f"{i:04d}" for i in range(20)]
    order = rng.permutation(20)
    write_states(tmp_path / "a.npz", {"x": recorded(first, ids).stacked()})
    write_states(tmp_path / "b.npz", {"x": recorded(second[order], [ids[i] for i in order]).stacked()})
    shuffled = paired_bootstrap((read_states(tmp_path / "a.npz", "x"), read_states(tmp_path / "b.npz", "x")))
    straight = interval_of(first, second, tmp_path)
    assert shuffled.difference == pytest.approx(straight.difference)
    assert shuffled.low == pytest.approx(straight.low) and shuffled.high == pytest.approx(straight.high)


def test_other_images_are_refused(tmp_path: Path) -> None:
    write_states(tmp_path / "a.npz", {"x": recorded(np.ones((2, 2)), ["p", "q"]).stacked()})
    write_states(tmp_path / "b.npz", {"x": recorded(np.ones((2, 2)), ["p", "r"]).stacked()})
    with pytest.raises(UserError, match="the same images"):
        paired_bootstrap((read_states(tmp_path / "a.npz", "x"), read_states(tmp_path / "b.npz", "x")))


@pytest.mark.parametrize("damage", ["missing", "damaged", "another function"])
def test_states_that_cannot_be_read_are_one_line(tmp_path: Path, damage: str) -> None:
    file = tmp_path / "x.npz"
    if damage == "damaged":
        file.write_bytes(b"no archive")
    elif damage == "another function":
        write_states(file, {"oracle": recorded(np.ones((2, 2))).stacked()})
    with pytest.raises(UserError, match="evaluate again"):
        read_states(file, "lm")


def test_the_states_of_the_images_add_up_to_the_metric() -> None:
    task: Any = TASKS["depth"]
    rng = np.random.default_rng(0)
    metric, states = task.metric([]), ImageStates()
    for i in range(5):
        truth = rng.uniform(1, 5, (8, 8)).astype(np.float32)
        before = metric.state()
        metric.update(
            truth + rng.normal(size=(8, 8)).astype(np.float32),
            Sample(str(i), np.zeros((8, 8, 3), np.uint8), {"depth": truth}),
        )
        states.add(str(i), before, metric.state())
    again = task.metric([])
    again.load_state({name: x.sum(0) for name, x in states.stacked()[1].items()})
    assert again.compute() == pytest.approx(metric.compute())


def test_an_evaluation_has_intervals_of_its_figures_and_writes_the_states(lm_dir: Path, tmp_path: Path) -> None:
    result = evaluate(lm_dir, states=tmp_path / "states.npz")
    (found,) = (x for x in result["intervals"] if x["second"] == "oracle")
    figures = result["figures"]
    assert found["first"] == "lm" and found["metric"] == "rmse"
    assert found["difference"] == pytest.approx(figures["lm"]["rmse"] - figures["oracle"]["rmse"])
    assert found["low"] <= found["difference"] <= found["high"]
    ids, states = read_states(tmp_path / "states.npz", "lm")
    assert len(ids) == result["images"] == 6 and states["counts"].sum(0)[0] == 6


def test_the_resamples_are_the_same_on_every_machine() -> None:
    values = np.random.default_rng(5).uniform(1, 2, (7, 2))
    drawn = np.random.default_rng(0).multinomial(7, [1 / 7] * 7, size=1000) @ values
    found = resampled(Ratio(), "ratio", recorded(values).stacked())
    np.testing.assert_allclose(found.figures, [values[:, 0].sum() / values[:, 1].sum(), *(drawn[:, 0] / drawn[:, 1])])


def test_the_images_of_all_pairs_must_be_the_same() -> None:
    here, there = (resampled(Ratio(), "ratio", recorded(np.ones((2, 2)), ["p", x]).stacked()) for x in "qr")
    with pytest.raises(UserError, match="the same images"):
        interval([(here, here), (there, there)])


def test_a_single_image_has_no_interval() -> None:
    many, single = ({name: recorded(np.ones((n, 2))).stacked() for name in ("lm", "oracle")} for n in (2, 1))
    assert [(x["first"], x["second"]) for x in intervals.intervals(Ratio(), "ratio", many)] == [("lm", "oracle")]
    ids, arrays = single["lm"]
    assert (
        intervals.intervals(Ratio(), "ratio", {name: (ids, {**arrays, "more": arrays["sums"]}) for name in single})
        == []
    )


@pytest.mark.parametrize(("numbers", "kept"), [(10_000, True), (10_001, False)])
def test_states_of_up_to_ten_thousand_numbers_are_kept(
    numbers: int, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Ratio, "state", lambda _: {"one": np.zeros(9_000), "two": np.zeros((numbers - 9_000, 1))})
    assert intervals.is_recordable(Ratio()) == kept


def test_states_too_large_to_keep_are_not_recorded(lm_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intervals, "MAX_NUMBERS", 3)
    assert evaluate(lm_dir)["intervals"] == []
