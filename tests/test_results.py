"""The result of an evaluation: never lost to another one, and a damaged one does not count."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.small import ORACLE
from uvim_fsq.cli import main
from uvim_fsq.errors import UserError
from uvim_fsq.evaluation.results import finished, read_result, variant_path
from uvim_fsq.experiments import quickstart as quickstart_module

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SHIPPED = sorted(CONFIGS.rglob("*.yaml"))


@pytest.fixture()
def run_dir(tmp_path: Path, lm_dir: Path) -> Path:
    # Other tests evaluate the same run.
    return shutil.copytree(lm_dir, tmp_path / "run", ignore=shutil.ignore_patterns("evaluation_*"))


def test_another_evaluation_does_not_take_the_place_of_the_full_one(run_dir: Path) -> None:
    before = (run_dir / "evaluation.json").read_bytes()
    for settings, name in (
        (["--limit", "5"], "evaluation_limit-5.json"),
        (["eval.limit=4"], "evaluation_limit-4.json"),
        (["task.decoding=expectation", "eval.top_k=3"], "evaluation_top_k-3_decoding-expectation.json"),
    ):
        main(["evaluate", str(run_dir), *settings])
        assert (run_dir / "evaluation.json").read_bytes() == before
        assert json.loads((run_dir / name).read_text())["overrides"]
    # What only says how fast is the same evaluation.
    (run_dir / "evaluation.json").unlink()
    main(["evaluate", str(run_dir), "eval.batch_size=3", "eval.workers=0", "eval.limit=null"])
    again, first = json.loads((run_dir / "evaluation.json").read_text()), json.loads(before)
    assert again["images"] == first["images"] == 6 and again["limit"] is None
    assert len(list(run_dir.glob("evaluation*.json"))) == 4


def test_names_of_results() -> None:
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


def test_a_whole_result_counts(run_dir: Path) -> None:
    assert finished(run_dir) and read_result(run_dir)["images"] == 6
    file = run_dir / "evaluation.json"
    file.write_bytes(file.read_bytes()[:-200])
    assert not finished(run_dir)


@pytest.mark.parametrize("name", ["summary.json", "seconds.json", "evaluation.json", "lm/evaluation.json"])
@pytest.mark.parametrize("text", ["", "[1]", "{}"])
def test_the_quickstart_goes_on_with_damaged_files(
    tmp_path: Path, oracle_dir: Path, lm_dir: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str
) -> None:
    trained: list[str] = []
    monkeypatch.setattr(quickstart_module, "_make_data", lambda *_: pytest.fail("the data are there"))
    monkeypatch.setattr(quickstart_module, "_run_config", lambda scale, task, stage, out: stage)
    monkeypatch.setattr(quickstart_module, "write_evaluation", lambda *_: None)

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


def one_line(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    with pytest.raises(SystemExit) as caught:
        main([str(a) for a in arguments])
    captured = capsys.readouterr()
    assert caught.value.code == 2 and len(captured.err.strip().splitlines()) == 1, captured.err
    return captured.err


def test_a_folder_of_runs_names_them(tmp_path: Path, capsys: pytest.CaptureFixture[str], lm_dir: Path) -> None:
    (tmp_path / "data").mkdir()
    for name in ("lm", "oracle"):
        shutil.copytree(lm_dir, tmp_path / name)
    said = one_line(capsys, "evaluate", tmp_path)
    assert f"did you mean {tmp_path / 'lm'} or {tmp_path / 'oracle'}?" in said
    assert "give a run directory" in one_line(capsys, "evaluate", tmp_path / "data")


def test_yes_and_no_are_words_to_a_user(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(yaml.safe_dump(ORACLE))
    said = one_line(capsys, "train-oracle", file, "train.out=x", "train.resume=yes")
    assert "train.resume=True: must be no, auto or text (YAML reads yes" in said
    assert "data.root=False: must be text (YAML reads yes" in one_line(capsys, "config", file, "data.root=off")
    main(["config", str(file), "train.out=x", "train.resume=no"])
    assert yaml.safe_load(capsys.readouterr().out)["train"]["resume"] == "no"
    file.write_text("extends: b.yaml\ntrain: {resume: no}\n")
    (tmp_path / "b.yaml").write_text(yaml.safe_dump(ORACLE))
    main(["config", str(file), "train.out=x"])
    assert yaml.safe_load(capsys.readouterr().out)["train"]["resume"] == "no"


@pytest.mark.parametrize("file", SHIPPED, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_config_reads_every_shipped_file(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("UVIM_FSQ_DATA", str(tmp_path))
    if file.parent.name == "ablations":
        assert f"{file} is a grid; uvim-fsq ablate {file} --dry-run" in one_line(capsys, "config", file)
        return
    main(["config", str(file)])
    captured = capsys.readouterr()
    tree = yaml.safe_load(captured.out)
    assert tree["stage"] == ("lm" if "lm" in file.stem else "oracle") and tree["train"]["batch_size"] > 0
    assert all(line.startswith("note: ") for line in captured.err.splitlines())
    assert ("no such run yet" in captured.err) == (tree["stage"] == "lm")
    assert ("train.out is empty" in captured.err) == (not tree["train"]["out"])


def test_config_still_refuses_what_is_impossible(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.yaml").write_text(yaml.safe_dump({**ORACLE, "train": {"batch_size": 4}}))
    assert "give exactly one of train.epochs" in one_line(capsys, "config", tmp_path / "a.yaml")
