"""A downloaded run: its configuration refers to nothing else, and impossible settings are one line."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.cli import failure
from tests.support.runs import sign_all
from uvim_fsq.checkpoints.loading import load_checkpoint
from uvim_fsq.checkpoints.run_directory import resolve_checkpoint
from uvim_fsq.cli import main
from uvim_fsq.errors import UserError
from uvim_fsq.tasks.configuration import load_run

pytestmark = pytest.mark.usefixtures("no_trusted_plugins")


def change_config(run: Path, **changes: Any) -> None:
    for file in (run / "config.yaml", resolve_checkpoint(run) / "config.yaml"):
        tree = yaml.safe_load(file.read_text())
        for key, value in changes.items():
            section, _, name = key.rpartition("__")
            (tree[section] if section else tree)[name] = value
        file.write_text(yaml.safe_dump(tree))
    sign_all(run)


def test_a_runs_configuration_refers_to_nothing_else(
    tmp_path: Path, oracle_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MY_SECRET", "hunter2")
    for changes in (
        {"data__train_split": "${oc.env:MY_SECRET}"},
        {"data__crop_area": [0.5, "${data.hflip}"]},
        {"task": {"name": "nyu_depth", "${oc.env:MY_SECRET}": 3}},
    ):
        run = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(oracle_dir, run)
        change_config(run, **changes)
        said = failure(capsys, "evaluate", run)
        assert "contains ${...}, which a run's configuration may not" in said and "hunter2" not in said
    run = tmp_path / "extends"
    shutil.copytree(oracle_dir, run)
    (tmp_path / "secret.yaml").write_text("password hunter2: 3\n")
    change_config(run, extends=str(tmp_path / "secret.yaml"))
    said = failure(capsys, "evaluate", run)
    assert "contains `extends`" in said and "hunter2" not in said
    # The user's own overrides may use interpolation.
    monkeypatch.setenv("MY_SPLIT", "val")
    main(["evaluate", str(oracle_dir), "data.train_split=${oc.env:MY_SPLIT}", "--json", str(tmp_path / "result.json")])
    assert load_run({"task": {"name": "nyu_depth"}, "data": {"root": "${oc.env:MY_SECRET}"}}).data.root == "hunter2"


@pytest.mark.slow
def test_impossible_settings_of_a_run_are_one_line(
    tmp_path: Path, lm_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo = next(lm_dir.rglob("*.png"))
    for place, change, said in (
        ("lm", {"eval__batch_size": 0}, "eval.batch_size=0: must be above 0"),
        ("lm", {"eval__batch_size": -3}, "eval.batch_size=-3: must be above 0"),
        ("lm", {"data__image_size": 0}, "data.image_size=0: must be above 0"),
        ("lm", {"model__num_heads": 3}, "not divisible by model.num_heads=3"),
        ("lm", {"model__width": -4}, "model.width=-4: must be above 0"),
        ("lm", {"model__mlp_dim": 10**12}, "must be below 2^31"),
        ("lm", {"model__mlp_dim": 2**31 - 1, "model__width": 2**31 - 2}, "needs a machine with more"),
        ("oracle", {"model__patch_size": 0}, "model.patch_size=0: must be above 0"),
        ("oracle", {"model__code_length": 2**40}, "must be below 2^31"),
    ):
        run = tmp_path / "run"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(lm_dir, run)
        change_config(run / "oracle" if place == "oracle" else run, **change)
        assert said in failure(capsys, "predict", run, photo, "--out", tmp_path / "out"), change
    # Training settings no longer matter.
    run = tmp_path / "odd"
    shutil.copytree(lm_dir, run)
    change_config(run, optim__warmup_steps=50, train__keep=0)
    assert load_checkpoint(run, ["eval.seed=1"]).overrides == {"eval.seed": [0, 1]}
    with pytest.raises(UserError, match=r"optim.warmup_steps=50 must be below train.steps=5$"):
        load_checkpoint(run, ["train.steps=5"])
