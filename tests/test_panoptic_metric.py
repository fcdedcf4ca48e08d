"""Panoptic quality equals the golden figures, a slow reference of our own and, where installed, panopticapi."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from uvim_fsq.data.resize import resize_nearest
from uvim_fsq.data.sample import Sample
from uvim_fsq.errors import UserError
from uvim_fsq.tasks.coco_panoptic.metrics import PanopticMetric, count_matches
from uvim_fsq.tasks.coco_panoptic.official import ResultWriter, run_panopticapi
from uvim_fsq.tasks.coco_panoptic.segments import MAX_ID, Segments, ids_to_rgb, rgb_to_ids, segment_index

GOLDEN = Path(os.environ.get("UVIM_FSQ_GOLDEN", Path(__file__).parent / "golden")) / "pq"
CLASSES = 5
CATEGORY_IDS = [3, 7, 8, 90, 200]
IS_THING = [True, True, False, True, False]
KINDS = ("regions", "noise", "empty prediction", "void truth", "one class", "crowds", "many")
CASES = [(kind, seed) for kind in KINDS for seed in range(4 if kind == "many" else 12)]


def segments(ids: Any, *rows: tuple[int, int, bool]) -> Segments:
    """Of pixels and (id, class, crowd)."""
    table = np.array(rows, np.int64).reshape(-1, 3)
    return Segments(np.array(ids, np.int32), table[:, 0], table[:, 1].astype(np.int32), table[:, 2].astype(bool))


def random_case(kind: str, seed: int) -> tuple[Segments, Segments]:
    """Prediction and truth: coarse regions, the prediction's shifted, relabelled and sprinkled with noise."""
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


def sample(truth: Segments, name: str = "x") -> Sample:
    return Sample(name, np.zeros((*truth.ids.shape, 3), np.uint8), meta={"segments": truth})


def metric() -> PanopticMetric:
    return PanopticMetric("coco_panoptic/pq", [f"c{i}" for i in CATEGORY_IDS], IS_THING)


def write_truth(folder: Path, truths: dict[int, Segments]) -> tuple[Path, Path]:
    """In COCO's format; its JSON and PNG folder."""
    pngs = folder / "gt"
    pngs.mkdir(parents=True)
    annotations = []
    for image_id, truth in truths.items():
        Image.fromarray(ids_to_rgb(truth.ids)).save(pngs / f"{image_id}.png")
        listed = zip(truth.segment_ids.tolist(), truth.classes.tolist(), truth.crowd.tolist(), strict=True)
        infos = [
            {"id": i, "category_id": CATEGORY_IDS[c - 1], "iscrowd": int(w), "area": int((truth.ids == i).sum())}
            for i, c, w in listed
        ]
        annotations.append({"image_id": image_id, "file_name": f"{image_id}.png", "segments_info": infos})
    categories = [{"id": i, "name": f"c{i}", "isthing": int(t)} for i, t in zip(CATEGORY_IDS, IS_THING, strict=True)]
    (folder / "gt.json").write_text(json.dumps({"categories": categories, "annotations": annotations}))
    return folder / "gt.json", pngs


def read_segments(png: Path, infos: list[dict[str, Any]], category_ids: list[int]) -> Segments:
    rows = [(info["id"], category_ids.index(info["category_id"]) + 1, info.get("iscrowd", 0)) for info in infos]
    return segments(rgb_to_ids(np.asarray(Image.open(png))), *rows)


def test_golden() -> None:
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


def test_void_leaves_the_union_and_half_is_not_enough() -> None:
    prediction = segments([[1, 1, 1, 1]], (1, 1, False))
    np.testing.assert_array_equal(
        count_matches(prediction, segments([[9, 9, 0, 0]], (9, 1, False)), 1).T, [[1, 1, 0, 0]]
    )
    # IoU of exactly 0.5 is no match; void of exactly half the area does not forgive.
    np.testing.assert_array_equal(
        count_matches(prediction, segments([[9, 9, 8, 8]], (9, 1, False), (8, 1, True)), 1).T, [[0, 0, 1, 1]]
    )


def test_only_the_last_listed_crowd_of_a_class_forgives() -> None:
    prediction, rows = segments([[1, 1, 1, 1]], (1, 1, False)), [(5, 1, True), (6, 1, True)]
    for listed, false_positives in ((rows, 1), (rows[::-1], 0)):
        assert count_matches(prediction, segments([[5, 5, 5, 6]], *listed), 1)[2, 0] == false_positives


def test_segments_without_pixels() -> None:
    prediction, truth = segments([[0, 0]], (1, 1, False)), segments([[4, 4]], (4, 1, False), (6, 2, False))
    np.testing.assert_array_equal(count_matches(prediction, truth, 2), [[0, 0], [0, 0], [0, 0], [1, 1]])
    nothing = segments([[0, 0]])
    np.testing.assert_array_equal(count_matches(nothing, truth, 2), [[0, 0], [0, 0], [0, 0], [1, 1]])
    assert not count_matches(nothing, nothing, 2).any() and not count_matches(prediction, nothing, 2).any()
    assert metric().update(nothing, sample(nothing)) == {"pq": 0.0, "segments_gt": 0.0, "segments_pred": 0.0}


def test_processes_add_up_to_one() -> None:
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


def test_one_image_perfectly_predicted() -> None:
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
def test_mistakes_are_named(prediction: Segments, truth: Segments, message: str) -> None:
    ours = metric()
    with pytest.raises(UserError, match=message) as error:
        ours.update(prediction, sample(truth, "img.jpg"))
    assert "\n" not in str(error.value) and not ours.images.any()


def test_ids_and_colours() -> None:
    rng = np.random.default_rng(0)
    ids = np.append(rng.integers(0, MAX_ID + 1, 40), [0, 1, 256, 65536, MAX_ID]).astype(np.int32).reshape(9, 5)
    rgb = ids_to_rgb(ids)
    np.testing.assert_array_equal(rgb.astype(int) @ [1, 256, 65536], ids)
    np.testing.assert_array_equal(rgb_to_ids(rgb), ids)
    np.testing.assert_array_equal(rgb_to_ids(rgb[::-1, ::2]), ids[::-1, ::2])
    assert rgb_to_ids(rgb).dtype == np.int32 and rgb.dtype == np.uint8
    listed = ids.ravel()[rng.permutation(40)]
    # None of the last is listed; all 24 bits and more are looked at.
    others = [-1, MAX_ID - 1, -(2**31), 2**31 - 1, *(listed + MAX_ID + 1), *(listed + MAX_ID + 1025), *-listed]
    index = segment_index(np.array([0, *listed, *others], np.int32), listed)
    np.testing.assert_array_equal(index, [*range(41), *[-1] * len(others)])


def test_official_files_hold_the_same_segments(tmp_path: Path) -> None:
    writer = ResultWriter(tmp_path / "new" / "official", CATEGORY_IDS)
    cases = {i: random_case(*CASES[i]) for i in range(len(CASES))}
    entries = [writer.add(prediction, image_id, f"{image_id:012d}.png") for image_id, (prediction, _) in cases.items()]
    path = writer.finish(reversed(entries))
    annotations = json.loads(path.read_text())["annotations"]
    assert [entry["image_id"] for entry in annotations] == list(cases)
    assert all(type(v) is int for e in entries for info in e["segments_info"] for v in (*info.values(), e["image_id"]))
    for entry, (prediction, truth) in zip(annotations, cases.values(), strict=True):
        read = read_segments(path.parent / "panoptic" / entry["file_name"], entry["segments_info"], CATEGORY_IDS)
        np.testing.assert_array_equal(read.segment_ids, np.arange(1, len(read.segment_ids) + 1))
        assert set(np.unique(read.ids)) - {0} == set(read.segment_ids.tolist())
        np.testing.assert_array_equal(count_matches(read, truth, CLASSES), count_matches(prediction, truth, CLASSES))
    with pytest.raises(UserError, match="3.png: the prediction holds segment id 3"):
        writer.add(segments([[3]], (1, 1, False)), 3, "3.png")
    (path.parent / "panoptic" / "none").write_text("a file where a folder should be")
    with pytest.raises(UserError, match="cannot write .*none/3.png: "):
        writer.add(segments([[1]], (1, 1, False)), 3, "none/3.png")
    assert not list(path.parent.glob(".tmp*"))


def compare_with_panopticapi(folder: Path, cases: dict[int, tuple[Segments, Segments]]) -> float:
    """The largest difference between our figures and panopticapi's, in percent; one case is not evaluated."""
    truths = {i: truth for i, (_, truth) in cases.items()}
    gt_json, gt_folder = write_truth(folder, {-1: random_case("regions", 0)[1], **truths})
    ours, writer = metric(), ResultWriter(folder / "pred", CATEGORY_IDS)
    entries = []
    for i, (prediction, truth) in cases.items():
        ours.update(prediction, sample(truth))
        entries.append(writer.add(prediction, i, f"{i}.png"))
    theirs = run_panopticapi(gt_json, gt_folder, writer.finish(entries), writer.pngs)
    assert theirs is not None
    figures = ours.compute()
    assert set(theirs) == {key + group for key in ("pq", "sq", "rq") for group in ("", "_things", "_stuff")}
    return max(abs(figures[name] - value) for name, value in theirs.items())


def test_panopticapi_agrees(tmp_path: Path) -> None:
    pytest.importorskip("panopticapi")
    cases = {i: random_case(*CASES[i]) for i in range(len(CASES))}
    assert compare_with_panopticapi(tmp_path, cases) < 1e-9


FAKE = """
import json
def pq_compute(gt_json, pred_json, gt_folder, pred_folder):
    print("much")
    images = len(json.load(open(gt_json))["annotations"])
    if images == 2:
        raise KeyError("segment 7")
    return {g: {"pq": i / 10, "sq": 0.5, "rq": 0, "n": 3} for i, g in enumerate(("All", "Things", "Stuff"))}
"""


def test_running_panopticapi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lib/panopticapi").mkdir(parents=True)
    (tmp_path / "lib/panopticapi/__init__.py").touch()
    (tmp_path / "lib/panopticapi/evaluation.py").write_text(FAKE)
    truth = segments([[1]], (1, 1, False))
    gt_json, gt_folder = write_truth(tmp_path, dict.fromkeys((4, 5, 6), truth))
    writer = ResultWriter(tmp_path / "pred", CATEGORY_IDS)
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(UserError, match="panopticapi is not installed .pip install .* are ready for it"):
            run_panopticapi(gt_json, gt_folder, writer.finish([]), writer.pngs)
    monkeypatch.syspath_prepend(tmp_path / "lib")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "lib"))
    figures = run_panopticapi(gt_json, gt_folder, writer.finish([writer.add(truth, 5, "5.png")]), writer.pngs)
    assert len(figures) == 9
    assert figures["pq_stuff"] == 20 and figures["sq"] == 50 and figures["rq_things"] == 0
    entries = [writer.add(truth, i, f"{i}.png") for i in (4, 6)]
    with pytest.raises(UserError, match="panopticapi cannot score .*panoptic.json: KeyError: 'segment 7'$"):
        run_panopticapi(gt_json, gt_folder, writer.finish(entries), writer.pngs)
    with pytest.raises(UserError, match="has no image of"):
        run_panopticapi(gt_json, gt_folder, writer.finish([writer.add(truth, 99, "99.png")]), writer.pngs)
