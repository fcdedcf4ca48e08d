"""Configuration files that extend others, and broken ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from uvim_fsq.checkpoints.run_directory import checkpoints
from uvim_fsq.config.yaml_files import read_tree, skim_tree
from uvim_fsq.errors import UserError
from uvim_fsq.tasks.configuration import load_run


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("extends: a.yaml", "forms a cycle"),
        ("extends: b.yaml", "b.yaml: no such configuration file"),
        ("extends: [b.yaml]", "must be the path of one file"),
        ("train: {steps: 3}\ntrain: {seed: 3}", "duplicate key train"),
        ("1: 2\ntask: {name: nyu_depth}", "unknown key 1"),
        ("[1, 2]", "must hold keys and values"),
        ("3", "must hold keys and values"),
        ("train: [", "is not valid YAML"),
        ("train: {out: '${x'}\nextends: a.yaml", "no viable alternative"),
    ],
)
def test_a_broken_file_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.yaml").write_text(text + "\n")
    with pytest.raises(UserError) as caught:
        load_run(tmp_path / "a.yaml")
    assert message in str(caught.value)


def test_a_runs_configuration_is_the_same_read_quickly(random_runs: tuple[Path, Path]) -> None:
    for run in random_runs:
        file = checkpoints(run)[-1] / "config.yaml"
        assert skim_tree(file) == read_tree(file)


def test_a_file_that_is_read_quickly_is_checked_as_well(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("a: " + "[" * 99 + "]" * 99)
    with pytest.raises(UserError, match="nested more than"):
        skim_tree(tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_text("a: !!python/object/apply:os.getcwd []")
    with pytest.raises(UserError, match="not valid YAML"):
        skim_tree(tmp_path / "a.yaml")


def test_a_tree_that_was_changed_is_read_again_as_it_was(tmp_path: Path) -> None:
    """Equal texts are parsed once."""
    file = tmp_path / "config.yaml"
    file.write_text("model: {width: 3}\n")
    tree = read_tree(file)
    tree["model"]["width"] = 4
    assert read_tree(file) == {"model": {"width": 3}}
