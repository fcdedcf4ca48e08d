"""Configurations beyond all bounds, and messages that quote no other file."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.support.cli import failure
from tests.support.runs import sign_all

pytestmark = pytest.mark.usefixtures("no_trusted_plugins")


@pytest.mark.parametrize(
    "content",
    [
        "root:x:0:0:hunter2:/root:/bin/bash\ndaemon:x:1:1:daemon:/usr/sbin\n",
        "password hunter2 of mine: 3\n",
        "key: [hunter2\n",
        "hunter2",
        "a: 'hunter2\n",
        "a: b: hunter2\n",
        "? [hunter2]\n: 3\n",
        "a: !hunter2 3\n",
        "a: " + "9" * 5000,
    ],
)
def test_no_message_quotes_another_file(
    tmp_path: Path, oracle_dir: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "secret").write_text(content)
    (tmp_path / "own.yaml").write_text("extends: secret\ntask: {name: nyu_depth}\ntrain: {steps: 3, out: x}\n")
    said = failure(capsys, "config", tmp_path / "own.yaml")
    assert "hunter2" not in said and len(said) < 400
    run = tmp_path / "run"
    shutil.copytree(oracle_dir, run)
    for file in run.rglob("config.yaml"):
        file.unlink()
        file.symlink_to(tmp_path / "secret")
    sign_all(run)
    said = failure(capsys, "evaluate", run)
    assert "hunter2" not in said and len(said) < 400


@pytest.mark.slow
def test_oversized_configurations_are_one_line(
    tmp_path: Path, oracle_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    laughs = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)
    )
    for text, message in (
        ("train: " + "[" * 20_000 + "]" * 20_000, "levels deep"),
        ("train: " + "{a: " * 20_000 + "1" + "}" * 20_000, "levels deep"),
        (laughs, "is not valid YAML"),
        ("x: &a [*a]", "is not valid YAML"),
        ("title: " + "x" * 1_000_001, "longer than 1000000 bytes"),
        ("train: {seed: 0x" + "f" * 5000 + "}", "train.seed=a number with thousands of digits: must fit in 64 bits"),
        ("train: {seed: 18446744073709551616}", "must fit in 64 bits"),
        ("optim: {lr: " + "1" * 4000 + "}", "must be a number"),
    ):
        file = tmp_path / "a.yaml"
        file.write_text(f"task: {{name: nyu_depth}}\n{text}\n")
        assert message in failure(capsys, "config", file), text[:40]
        grid = tmp_path / "grid.yaml"
        grid.write_text(f"{text}\n")
        assert len(failure(capsys, "ablate", grid, "--out", tmp_path / "g")) < 500
    for override in ("train.steps=" + "[" * 20_000 + "]" * 20_000, ".".join("a" * 20_000) + "=1"):
        assert "is nested too deeply" in failure(capsys, "evaluate", oracle_dir, override)
    assert "number that is too long" in failure(capsys, "evaluate", oracle_dir, "train.seed=" + "9" * 5000)
