"""The quickstart of every built-in task."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.small import LM, ORACLE, TASK_OPTIONS
from uvim_fsq.errors import UserError
from uvim_fsq.evaluation.results import read_result
from uvim_fsq.experiments import quickstart as quickstart_module
from uvim_fsq.experiments.quickstart import Scale, quickstart


@pytest.mark.slow
@pytest.mark.parametrize("task", ["nyu_depth", "coco_panoptic", "imagenet_color"])
def test_quickstart_writes_the_same_table_for_every_task(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / task).mkdir()
    oracle: dict[str, Any] = {**ORACLE, "task": {"name": task, **TASK_OPTIONS.get(task, {})}}
    for name, tree in (("oracle", oracle), ("lm", {**LM, "oracle": "replaced"})):
        (tmp_path / task / f"quickstart_{name}.yaml").write_text(yaml.safe_dump(tree))
    monkeypatch.setattr("uvim_fsq.config.shipped.shipped_folder", lambda: tmp_path)
    monkeypatch.setattr(quickstart_module, "SMALL", Scale("quickstart", 12, 9, "plain"))
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


def test_the_quickstart_refuses_an_unknown_task(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Known tasks"):
        quickstart(tmp_path / "q", task="nothing_like_it")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["summary.json", "seconds.json", "evaluation.json", "lm/evaluation.json"])
@pytest.mark.parametrize("text", ["", "[1]", "{}"])
def test_the_quickstart_continues_with_damaged_files(
    tmp_path: Path, oracle_dir: Path, lm_dir: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str
) -> None:
    trained: list[str] = []
    monkeypatch.setattr(quickstart_module, "_make_data", lambda *_: pytest.fail("the data are there"))
    monkeypatch.setattr(quickstart_module, "_run_config", lambda scale, task, stage, out, given: stage)
    monkeypatch.setattr(quickstart_module, "write_evaluation_page", lambda *_: None)

    def train(stage: Any) -> None:
        trained.append(stage)
        shutil.copy(lm_dir / "evaluation.json", out / stage / "evaluation.json")

    monkeypatch.setattr(quickstart_module, "train", train)
    out = tmp_path / "quickstart"
    for stage, source in (("oracle", oracle_dir), ("lm", lm_dir)):
        shutil.copytree(source, out / stage)
    (out / "data").mkdir()
    summary = quickstart_module.quickstart(out)
    assert trained == [] and summary["seconds"]["evaluate"] > 0
    (out / "seconds.json").write_text('{"data": 3.0}')
    (out / name).write_text(text)
    if name != "summary.json":
        (out / "summary.json").unlink()
    again = quickstart_module.quickstart(out)
    assert trained == (["lm"] if name == "lm/evaluation.json" else [])
    assert json.loads((out / "summary.json").read_text()) == json.loads(json.dumps(again))
    assert again["figures"] == summary["figures"] and read_result(out / "lm") and read_result(out)
    assert again["seconds"].get("data") == (None if name == "seconds.json" else 3.0)
    # A second call prints the finished run.
    assert quickstart_module.quickstart(out) == json.loads((out / "summary.json").read_text())
