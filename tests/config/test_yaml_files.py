"""Configuration files that extend others, and broken ones."""

from __future__ import annotations

from pathlib import Path

import pytest

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
