"""The HTML page of an evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from uvim_fsq.cli import main
from uvim_fsq.evaluation.run import evaluate
from uvim_fsq.reports import evaluation_page


@pytest.mark.parametrize("stage", ["oracle", "lm"])
def test_the_page_shows_the_curves_of_both_stages(
    random_runs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    oracle, lm = random_runs
    run, folders = (oracle, {"oracle": oracle}) if stage == "oracle" else (lm, {"oracle": oracle, "lm": lm})
    written: list[Any] = []
    monkeypatch.setattr(evaluation_page, "write_evaluation_page", lambda *arguments: written.append(arguments))
    result = evaluate(run, limit=1)
    evaluation_page.write_run_page(tmp_path / "page.html", run, ["eval.limit=1"], result)
    ((page, title, loaded, shown, where, device, compared),) = written
    assert (page, title, shown) == (tmp_path / "page.html", "nyu_depth: nyu_depth/full", result)
    assert device == torch.device("cpu") and where == folders and loaded.run.eval.limit == 1
    assert compared is None


def test_the_page_of_a_comparison_shows_the_direct_curve_too(
    random_runs: tuple[Path, Path], direct_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Any] = []
    monkeypatch.setattr(evaluation_page, "write_evaluation_page", lambda *arguments: written.append(arguments))
    evaluation_page.write_run_page(
        tmp_path / "page.html", random_runs[1], ["eval.limit=1"], {"protocol": ""}, direct_dir
    )
    *_, where, _, compared = written[0]
    assert where == {"oracle": random_runs[0], "lm": random_runs[1], "direct": direct_dir}
    assert compared.checkpoint.parent.parent == direct_dir and compared.run.eval.limit == 1


@pytest.mark.slow
def test_evaluate_writes_a_page_only_if_asked(random_runs: tuple[Path, Path], tmp_path: Path) -> None:
    command = ["evaluate", str(random_runs[0]), "--limit", "4", "--json", str(tmp_path / "result.json")]
    main(command)
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]
    main([*command, "--report", str(tmp_path / "page.html")])
    page = (tmp_path / "page.html").read_text()
    assert "nyu_depth/full" in page
    assert json.loads((tmp_path / "result.json").read_text())["checkpoint_sha256"][:16] in page
