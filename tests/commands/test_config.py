"""`uvim-fsq config`."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.support.cli import failure
from tests.support.paths import CONFIGS
from tests.support.small import ORACLE
from uvim_fsq.cli import main

SHIPPED = sorted(CONFIGS.rglob("*.yaml"))


def test_yaml_booleans_for_text_keys_are_explained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(yaml.safe_dump(ORACLE))
    said = failure(capsys, "train-oracle", file, "train.out=x", "train.resume=yes")
    assert "train.resume=True: must be no, auto or text (YAML reads yes" in said
    assert "data.root=False: must be text (YAML reads yes" in failure(capsys, "config", file, "data.root=off")
    main(["config", str(file), "train.out=x", "train.resume=no"])
    assert yaml.safe_load(capsys.readouterr().out)["train"]["resume"] == "no"
    file.write_text("extends: b.yaml\ntrain: {resume: no}\n")
    (tmp_path / "b.yaml").write_text(yaml.safe_dump(ORACLE))
    main(["config", str(file), "train.out=x"])
    assert yaml.safe_load(capsys.readouterr().out)["train"]["resume"] == "no"


@pytest.mark.slow
@pytest.mark.parametrize("file", SHIPPED, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_config_reads_every_shipped_file(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("UVIM_FSQ_DATA", str(tmp_path))
    if file.parent.name == "ablations":
        assert f"{file} is a grid; uvim-fsq ablate {file} --dry-run" in failure(capsys, "config", file)
        return
    main(["config", str(file)])
    captured = capsys.readouterr()
    tree = yaml.safe_load(captured.out)
    assert tree["stage"] in file.stem.split("_") and tree["train"]["batch_size"] > 0
    assert all(line.startswith("note: ") for line in captured.err.splitlines())
    assert ("no such run yet" in captured.err) == (tree["stage"] == "lm")
    assert ("train.out is empty" in captured.err) == (not tree["train"]["out"])


def test_config_refuses_impossible_combinations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.yaml").write_text(yaml.safe_dump({**ORACLE, "train": {"batch_size": 4}}))
    assert "give exactly one of train.epochs" in failure(capsys, "config", tmp_path / "a.yaml")


def test_config_prints_the_resolved_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(yaml.safe_dump(ORACLE))
    main(["config", str(file), "train.out=runs/a", "optim.lr=3e-4"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["optim"]["lr"] == 3e-4 and printed["task"]["num_bins"] == 16 and printed["train"]["out"] == "runs/a"
