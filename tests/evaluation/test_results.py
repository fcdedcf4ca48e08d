"""The stored result of an evaluation: never replaced by a partial one, and a damaged one does not count."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from uvim_fsq.cli import main
from uvim_fsq.errors import UserError
from uvim_fsq.evaluation.results import finished, read_result, variant_path


@pytest.fixture()
def run_dir(tmp_path: Path, lm_dir: Path) -> Path:
    # Other tests leave results in the shared run.
    return shutil.copytree(lm_dir, tmp_path / "run", ignore=shutil.ignore_patterns("evaluation_*"))


@pytest.mark.slow
def test_a_partial_evaluation_does_not_replace_the_full_one(run_dir: Path) -> None:
    before = (run_dir / "evaluation.json").read_bytes()
    for settings, name in (
        (["--limit", "5"], "evaluation_limit-5.json"),
        (["eval.limit=4"], "evaluation_limit-4.json"),
        (["task.decoding=expectation", "eval.top_k=3"], "evaluation_top_k-3_decoding-expectation.json"),
    ):
        main(["evaluate", str(run_dir), *settings])
        assert (run_dir / "evaluation.json").read_bytes() == before
        assert json.loads((run_dir / name).read_text())["overrides"]
    # Settings that affect only speed do not change the name.
    (run_dir / "evaluation.json").unlink()
    main(["evaluate", str(run_dir), "eval.batch_size=3", "eval.workers=0", "eval.limit=null"])
    again, first = json.loads((run_dir / "evaluation.json").read_text()), json.loads(before)
    assert again["images"] == first["images"] == 6 and again["limit"] is None
    assert len(list(run_dir.glob("evaluation*.json"))) == 4


def test_result_files_are_named_after_their_settings() -> None:
    path = Path("run/evaluation.json")
    assert variant_path(path, {}) == path
    assert variant_path(path, {"eval.batch_size": [4, 2], "optim.lr": [1, 2], "train.seed": [0, 1]}) == path
    assert variant_path(path, {"eval.temperature": [0.0, 0.7]}).name == "evaluation_temperature-0.7.json"
    assert variant_path(Path("run/official"), {"eval.limit": [None, 5]}) == Path("run/official_limit-5")
    one, two = (variant_path(path, {"data.root": ["x", root]}).name for root in ("/a/b", "/a-b"))
    assert one != two and one.startswith("evaluation_root-") and "/" not in one
    long = variant_path(path, {"data.root": ["x", "/long" * 100]}).name
    assert len(long) < 100 and long != variant_path(path, {"data.root": ["x", "/long" * 101]}).name


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "{}", '{"figures": {}}', "\x00" * 100, "[" * 100_000], ids=range(8)
)
def test_a_damaged_result_does_not_count(tmp_path: Path, text: str) -> None:
    assert not finished(tmp_path)
    (tmp_path / "evaluation.json").write_text(text)
    assert not finished(tmp_path)
    with pytest.raises(UserError, match="evaluation.json is damaged .*; evaluate again: uvim-fsq evaluate"):
        read_result(tmp_path)


def test_a_complete_result_counts(run_dir: Path) -> None:
    assert finished(run_dir) and read_result(run_dir)["images"] == 6
    file = run_dir / "evaluation.json"
    file.write_bytes(file.read_bytes()[:-200])
    assert not finished(run_dir)
