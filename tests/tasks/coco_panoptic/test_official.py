"""Files in COCO's result format, and scores by panopticapi where it is installed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.panoptic import (
    CASES,
    CATEGORY_IDS,
    CLASSES,
    IS_THING,
    metric,
    random_case,
    read_segments,
    sample,
    segments,
)
from uvim_fsq.errors import UserError
from uvim_fsq.tasks.coco_panoptic.metrics import count_matches
from uvim_fsq.tasks.coco_panoptic.official import ResultWriter, run_panopticapi
from uvim_fsq.tasks.coco_panoptic.segments import MAX_ID, Segments, ids_to_rgb, rgb_to_ids, segment_index


def write_truth(folder: Path, truths: dict[int, Segments]) -> tuple[Path, Path]:
    """Writes the truth in COCO's format; returns its JSON and PNG folder."""
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


def test_segment_ids_round_trip_through_rgb() -> None:
    rng = np.random.default_rng(0)
    ids = np.append(rng.integers(0, MAX_ID + 1, 40), [0, 1, 256, 65536, MAX_ID]).astype(np.int32).reshape(9, 5)
    rgb = ids_to_rgb(ids)
    np.testing.assert_array_equal(rgb.astype(int) @ [1, 256, 65536], ids)
    np.testing.assert_array_equal(rgb_to_ids(rgb), ids)
    np.testing.assert_array_equal(rgb_to_ids(rgb[::-1, ::2]), ids[::-1, ::2])
    assert rgb_to_ids(rgb).dtype == np.int32 and rgb.dtype == np.uint8
    listed = ids.ravel()[rng.permutation(40)]
    # None of these is listed; they differ from listed ids in all 24 bits and beyond.
    others = [-1, MAX_ID - 1, -(2**31), 2**31 - 1, *(listed + MAX_ID + 1), *(listed + MAX_ID + 1025), *-listed]
    index = segment_index(np.array([0, *listed, *others], np.int32), listed)
    np.testing.assert_array_equal(index, [*range(41), *[-1] * len(others)])


@pytest.mark.parametrize("side", [1, 20])
def test_areas_and_single_pixels_get_the_same_segment_numbers(side: int) -> None:
    cells = np.random.default_rng(0).choice([0, 7, 300, 65536, MAX_ID, 8], (6, 5)).astype(np.int32)
    ids = cells.repeat(side, 0).repeat(side, 1)[:, ::-1]
    table = {0: 0, 65536: 1, 7: 2, MAX_ID: 3, 300: 4, 8: -1}  # 8 is not listed
    expected = np.vectorize(table.__getitem__)(ids)
    index = segment_index(ids, np.array([65536, 7, MAX_ID, 300]))
    np.testing.assert_array_equal(index, expected)
    assert index.dtype == np.int32 and segment_index(ids[:0], np.array([7])).shape == (0, 5 * side)


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
    """The largest difference between our metrics and panopticapi's, in percent. One image has no prediction."""
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


def test_panopticapi_runs_in_a_process_and_its_errors_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
