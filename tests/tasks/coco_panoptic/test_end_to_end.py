"""The panoptic task through the commands: official results, prediction files, prepared labels."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import uvim_fsq.tasks.coco_panoptic.results as results_module
from tests.support.small import LM, ORACLE
from uvim_fsq.checkpoints.loading import resolve
from uvim_fsq.cli import main
from uvim_fsq.errors import UserError
from uvim_fsq.tasks.coco_panoptic.segments import rgb_to_ids
from uvim_fsq.tasks.configuration import load_run
from uvim_fsq.training.run import train


@pytest.fixture(scope="module")
def panoptic_lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("panoptic")
    main(["synth", "--format", "coco_panoptic", "--num", "12", "--num-val", "3", "--size", "24x32",
          "--out", str(base / "coco")])  # fmt: skip
    section = {"task": {"name": "coco_panoptic", "max_instances": 20}}
    train(resolve(load_run({**ORACLE, **section}, [f"train.out={base / 'oracle'}", f"data.root={base / 'coco'}"])))
    train(resolve(load_run(LM, [f"train.out={base / 'lm'}", f"oracle={base / 'oracle'}"])))
    return base / "lm"


@pytest.mark.slow
def test_official_result_files_and_scores(
    panoptic_lm: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    # panopticapi is not on PyPI: its scores are faked, the files are real.
    scored: list[tuple[Path, Path]] = []

    def score(gt_json: Path, gt_folder: Path, pred_json: Path, pred_folder: Path) -> dict[str, float]:
        assert gt_json.is_file() and gt_folder.is_dir()
        scored.append((pred_json, pred_folder))
        return {"pq": 12.5}

    monkeypatch.setattr(results_module, "run_panopticapi", score)
    report = tmp_path / "page.html"
    main(["evaluate", str(panoptic_lm), "--official", "--baseline", "--report", str(report)])
    said = capsys.readouterr().out
    assert "official/pq" in said and "12.5" in said and "most frequent class" in said
    assert [path.parent.name for path, _ in scored] == ["baseline", "oracle", "context_only", "lm"]
    for file, folder in scored:
        annotations = json.loads(file.read_text())["annotations"]
        assert len(annotations) == 3
        for entry in annotations:
            ids = rgb_to_ids(np.asarray(Image.open(folder / entry["file_name"])))
            assert ids.shape == (24, 32) and set(np.unique(ids)) - {0} == {s["id"] for s in entry["segments_info"]}
    result = json.loads((panoptic_lm / "evaluation.json").read_text())
    assert result["figures"]["lm"]["official/pq"] == 12.5 and "pq_things" in result["figures"]["lm"]
    assert result["protocol"] == "coco_panoptic/pq" and "pq" in report.read_text()


def test_our_metrics_survive_a_failure_of_the_official_program(
    panoptic_lm: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*paths: Path) -> None:
        raise UserError("panopticapi cannot score it")

    monkeypatch.setattr(results_module, "run_panopticapi", refuse)
    with pytest.warns(UserWarning, match="no official scores: panopticapi cannot score it"):
        main(["evaluate", str(panoptic_lm), "--official"])
    assert "pq_stuff" in capsys.readouterr().out


def test_predictions_are_written_as_picture_and_segments(panoptic_lm: Path, tmp_path: Path) -> None:
    photo = tmp_path / "photo.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (45, 61, 3), dtype=np.uint8)).save(photo)
    main(["predict", str(panoptic_lm), str(photo), "--out", str(tmp_path / "out")])
    (written,) = json.loads((tmp_path / "out" / "predictions.json").read_text())
    with Image.open(written["png"]) as png:
        ids = rgb_to_ids(np.asarray(png))
    infos = json.loads(Path(written["json"]).read_text())["segments_info"]
    assert ids.shape == (45, 61) and set(np.unique(ids)) - {0} == {info["id"] for info in infos}
    assert Image.open(written["overlay"]).height >= 45


def test_prepared_labels_give_the_same_metrics(panoptic_lm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = panoptic_lm.parent / "coco"
    main(["data", "prepare", str(root), "--task", "coco_panoptic"])
    assert "12 train and 3 val" in capsys.readouterr().out and (root / "prepared_panoptic").is_dir()
    before = json.loads((panoptic_lm / "evaluation.json").read_text())["figures"]["lm"]["pq"]
    main(["evaluate", str(panoptic_lm)])
    assert json.loads((panoptic_lm / "evaluation.json").read_text())["figures"]["lm"]["pq"] == before
