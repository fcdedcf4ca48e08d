"""Mistakes of a user are one line and exit code 2."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.support.cli import failure
from tests.support.small import ORACLE


def test_settings_that_contradict_the_trained_model_are_refused(
    oracle_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = failure(capsys, "evaluate", oracle_dir, "task.num_bins=8")
    assert "task.num_bins=8 (trained with 16)" in said and "cannot change" in said


def test_wrong_arguments_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], oracle_dir: Path, lm_dir: Path
) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(yaml.safe_dump(ORACLE))
    assert "no such configuration file" in failure(capsys, "config", tmp_path / "b.yaml")
    assert "use uvim-fsq train-oracle" in failure(capsys, "train-lm", file)
    assert "data.root is empty" in failure(capsys, "train-oracle", file, f"train.out={tmp_path / 'x'}")
    assert "no such folder" in failure(capsys, "data", "check", tmp_path / "nowhere", "--task", "nyu_depth")
    assert "no such run" in failure(capsys, "evaluate", tmp_path / "nowhere")
    assert "needs labels to predict" in failure(capsys, "predict", oracle_dir, __file__, "--out", tmp_path)
    assert "no such file" in failure(capsys, "predict", lm_dir, tmp_path / "no.jpg", "--out", tmp_path)
    assert "eval.limit=0: must be above 0" in failure(capsys, "evaluate", lm_dir, "--limit", "0")
    for jobs in ("0", "-1"):
        said = failure(capsys, "ablate", "ablations/table2_depth-small", "--jobs", jobs, "--dry-run")
        assert f"--jobs {jobs}: give at least 1" in said
    scenes = ("synth", "--num", "2", "--out", tmp_path / "s")
    assert "HEIGHTxWIDTH" in failure(capsys, *scenes, "--format", "nyu", "--size", "big")
    assert "at most 4096 pixels" in failure(capsys, *scenes, "--format", "nyu", "--size", "16x99999")
    said = failure(capsys, *scenes, "--format", "imagenet", "--layout", "mat")
    assert "--layout mat is one of --format nyu, not of imagenet" in said
    if not __import__("torch").cuda.is_available():
        assert "needs a GPU" in failure(capsys, "quickstart", "--gpu-scale", "--out", tmp_path / "q")
