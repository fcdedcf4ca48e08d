"""Every built-in task from scenes to report through the commands; panoptic's official files among it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvim_fsq.quickstart as module
import yaml
from PIL import Image

import uvim_fsq.tasks.coco_panoptic.results as results_module
from tests.support.small import LM, ORACLE
from tests.test_tasks import OPTIONS
from uvim_fsq.checkpoints.loading import resolve
from uvim_fsq.cli import main
from uvim_fsq.errors import UserError
from uvim_fsq.experiments.quickstart import Scale, quickstart
from uvim_fsq.tasks.coco_panoptic.segments import rgb_to_ids
from uvim_fsq.tasks.configuration import load_run
from uvim_fsq.training.run import train


@pytest.mark.parametrize("task", ["nyu_depth", "coco_panoptic", "imagenet_color"])
def test_quickstart_writes_the_same_table_for_every_task(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / task).mkdir()
    oracle: dict[str, Any] = {**ORACLE, "task": {"name": task, **OPTIONS.get(task, {})}}
    for name, tree in (("oracle", oracle), ("lm", {**LM, "oracle": "replaced"})):
        (tmp_path / task / f"quickstart_{name}.yaml").write_text(yaml.safe_dump(tree))
    monkeypatch.setattr(module, "CONFIGS", tmp_path)
    monkeypatch.setattr(module, "SMALL", Scale("quickstart", 12, 9, 16, "plain"))
    monkeypatch.setenv("UVIM_FSQ_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "out"
    summary = quickstart(out, task=task)
    metric = summary["table"][0][1]
    assert {f"{way}_{metric}" for way in ("baseline", "oracle", "context_only", "lm")} <= set(summary)
    assert len(summary["table"]) == 5 and summary["protocol"].startswith(task) and summary["data"]["count"] == 9
    assert set(summary["seconds"]) == {"data", "oracle", "lm", "evaluate", "total"}
    page = (out / "report.html").read_text()
    assert summary["baseline"] in page and page.count("data:image/png") >= 3 and "http" not in page
    assert json.loads((out / "summary.json").read_text()) == json.loads(json.dumps(summary))
    written = (out / "report.html").stat().st_mtime_ns
    assert quickstart(out, task=task)["figures"] == summary["figures"]
    assert (out / "report.html").stat().st_mtime_ns == written
    assert "holds a finished run" in " ".join(capsys.readouterr().out.split())


def test_quickstart_needs_scenes_of_the_task(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Known tasks"):
        quickstart(tmp_path / "q", task="nothing_like_it")


@pytest.fixture(scope="module")
def panoptic_lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("panoptic")
    main(["synth", "--format", "coco_panoptic", "--num", "12", "--num-val", "3", "--size", "24x32",
          "--out", str(base / "coco")])  # fmt: skip
    section = {"task": {"name": "coco_panoptic", "max_instances": 20}}
    train(resolve(load_run({**ORACLE, **section}, [f"train.out={base / 'oracle'}", f"data.root={base / 'coco'}"])))
    train(resolve(load_run(LM, [f"train.out={base / 'lm'}", f"oracle={base / 'oracle'}"])))
    return base / "lm"


def test_panoptic_official_results(
    panoptic_lm: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    # panopticapi is on no registry: where it is missing its figures are stood in for, the files are real.
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


def test_a_refusal_of_the_official_program_costs_nothing(
    panoptic_lm: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*paths: Path) -> None:
        raise UserError("panopticapi cannot score it")

    monkeypatch.setattr(results_module, "run_panopticapi", refuse)
    with pytest.warns(UserWarning, match="no official scores: panopticapi cannot score it"):
        main(["evaluate", str(panoptic_lm), "--official"])
    assert "pq_stuff" in capsys.readouterr().out


def test_panoptic_prediction_files(panoptic_lm: Path, tmp_path: Path) -> None:
    photo = tmp_path / "photo.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (45, 61, 3), dtype=np.uint8)).save(photo)
    main(["predict", str(panoptic_lm), str(photo), "--out", str(tmp_path / "out")])
    (written,) = json.loads((tmp_path / "out" / "predictions.json").read_text())
    with Image.open(written["png"]) as png:
        ids = rgb_to_ids(np.asarray(png))
    infos = json.loads(Path(written["json"]).read_text())["segments_info"]
    assert ids.shape == (45, 61) and set(np.unique(ids)) - {0} == {info["id"] for info in infos}
    assert Image.open(written["overlay"]).height >= 45


def test_prepare_from_the_command_line(panoptic_lm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = panoptic_lm.parent / "coco"
    main(["data", "prepare", str(root), "--task", "coco_panoptic"])
    assert "12 train and 3 val" in capsys.readouterr().out and (root / "prepared_panoptic").is_dir()
    before = json.loads((panoptic_lm / "evaluation.json").read_text())["figures"]["lm"]["pq"]
    main(["evaluate", str(panoptic_lm)])
    assert json.loads((panoptic_lm / "evaluation.json").read_text())["figures"]["lm"]["pq"] == before
