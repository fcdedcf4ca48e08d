"""The quickstart of every built-in task."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.small import DIRECT, LM, ORACLE, TASK_OPTIONS
from uvim_fsq.errors import UserError
from uvim_fsq.evaluation.results import read_result
from uvim_fsq.experiments import quickstart as quickstart_module
from uvim_fsq.experiments.quickstart import Scale, quickstart

SCALE = Scale("quickstart", 12, 9, "plain")


def write_configurations(folder: Path, task: str) -> None:
    """Small configurations of the three runs, where the quickstart of `task` looks for its own."""
    (folder / task).mkdir()
    section = {"name": task, **TASK_OPTIONS.get(task, {})}
    runs = {
        "oracle": {**ORACLE, "task": section},
        "lm": {**LM, "oracle": "replaced"},
        "direct": {**DIRECT, "task": section},
    }
    for name, tree in runs.items():
        (folder / task / f"quickstart_{name}.yaml").write_text(yaml.safe_dump(tree))


@pytest.mark.slow
@pytest.mark.parametrize("task", ["nyu_depth", "coco_panoptic", "imagenet_color"])
def test_quickstart_writes_the_same_table_for_every_task(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_configurations(tmp_path, task)
    monkeypatch.setattr("uvim_fsq.config.shipped.shipped_folder", lambda: tmp_path)
    monkeypatch.setattr(quickstart_module, "SMALL", SCALE)
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
def test_a_comparison_adds_the_direct_baseline_to_a_finished_quickstart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_configurations(tmp_path, "nyu_depth")
    monkeypatch.setattr("uvim_fsq.config.shipped.shipped_folder", lambda: tmp_path)
    monkeypatch.setattr(quickstart_module, "SMALL", SCALE)
    out = tmp_path / "out"
    keys = ["train.steps=3", "eval.temperature=0.5"]  # the second is no key of the direct baseline
    plain = quickstart(out, overrides=keys)
    assert not (out / "direct").exists() and "direct_rmse" not in plain
    capsys.readouterr()
    summary = quickstart(out, overrides=keys, compare=True)
    said = capsys.readouterr().out
    assert "4/5 train the direct baseline" in said and "train the oracle" not in said
    assert summary["direct_rmse"] == summary["figures"]["direct"]["rmse"] > 0
    assert summary["figures"]["lm"] == plain["figures"]["lm"] and summary["seconds"]["direct"] > 0
    assert [row[0] for row in summary["table"]].count("direct: image -> labels") == 1
    page = (out / "report.html").read_text()
    assert "<li><b>direct: image -&gt; labels</b>: the LM&#x27;s image encoder with a label head" in page
    assert quickstart(out, compare=True) == quickstart(out) == json.loads((out / "summary.json").read_text())


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
