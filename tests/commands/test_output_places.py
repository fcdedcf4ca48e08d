"""Places to write are checked before the work begins."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml

from tests.support.cli import failure
from tests.support.small import ORACLE
from uvim_fsq import cli


@pytest.mark.slow
@pytest.mark.parametrize("place", ["file", "file/under", "/proc/nowhere/under"])
def test_places_that_cannot_be_written_are_refused_before_the_work(
    tmp_path: Path, lm_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    (tmp_path / "file").write_text("the user's")
    config = tmp_path / "a.yaml"
    config.write_text(yaml.safe_dump(ORACLE))
    target = tmp_path / place
    for work in (
        "uvim_fsq.training.run.train",
        "uvim_fsq.evaluation.run.evaluate",
        "uvim_fsq.experiments.analysis.analyze_run",
    ):
        monkeypatch.setattr(work, lambda *_, **__: pytest.fail("the work has begun"))
    size = ("--num", 1, "--size", 16)
    lists = (
        ("train-oracle", config, f"train.out={target}"),
        ("analyze", lm_dir, "--out", target),
        ("predict", lm_dir, config, "--out", target),
        ("synth", "--format", "nyu", *size, "--out", target),
        ("data", "coltran-lists", "--out", target),
        ("quickstart", "--out", target),
        ("import-uvim", config, "--task", "depth", "--out", target),
    )
    for arguments in lists:
        said = failure(capsys, *(str(a) for a in arguments))
        assert said.startswith("error: cannot write ") and "Traceback" not in said, arguments
    # An existing file is replaced.
    if place == "file":
        target = tmp_path
    for option in ("--csv", "--json", "--report"):
        assert "error: cannot write " in failure(capsys, "evaluate", lm_dir, option, target), option
    assert "error: cannot write " in failure(capsys, "benchmark", "metrics", "--json", target)
    assert (tmp_path / "file").read_text() == "the user's"


def test_a_result_can_be_written_to_a_pipe(lm_dir: Path) -> None:
    # Not /dev/null: a bug that replaces devices would replace the machine's own.
    end, start = os.pipe()
    cli.main(["evaluate", str(lm_dir), "--limit", "1", "--json", f"/dev/fd/{start}"])
    assert json.loads(os.read(end, 1 << 16))["images"] == 1
