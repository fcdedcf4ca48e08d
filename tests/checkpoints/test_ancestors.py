"""What is known of the runs that a run started from, and what their images must not be used for."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from tests.support.cli import failure
from tests.support.hub import FakeHub
from tests.support.runs import save_untrained, sign
from tests.support.small import LM, ORACLE, lm_run, oracle_run
from uvim_fsq.checkpoints.ancestors import inherit, lineage, same_data
from uvim_fsq.checkpoints.identity import check_overrides, check_resume
from uvim_fsq.checkpoints.run_directory import checkpoints, weights_hash
from uvim_fsq.checkpoints.tuned import tuning_split
from uvim_fsq.config.rules import validate
from uvim_fsq.config.schema import Ancestor, OracleRun
from uvim_fsq.errors import UserError
from uvim_fsq.tasks.configuration import load_run

EARLIER = {
    "run": "runs/first",
    "weights": "0" * 64,
    "data_root": "elsewhere",
    "train_split": "a",
    "selection_split": "",
}


def rewritten(run: Path, copy: Path, **changes: object) -> Path:
    """A copy of a run whose last checkpoint has other keys in its configuration, signed."""
    shutil.copytree(run, copy)
    checkpoint = checkpoints(copy)[-1]
    tree = yaml.safe_load((checkpoint / "config.yaml").read_text())
    for key, value in changes.items():
        tree[key] = {**tree[key], **value} if isinstance(value, dict) else value
    (checkpoint / "config.yaml").write_text(yaml.safe_dump(tree))
    sign(checkpoint)
    return copy


def test_a_run_lists_its_ancestors_and_theirs(tmp_path: Path, data: Path, random_runs: tuple[Path, Path]) -> None:
    source = rewritten(random_runs[0], tmp_path / "source", ancestors=[EARLIER])
    run = oracle_run(tmp_path / "run", data, f"init_from={source}")
    first = Ancestor(str(checkpoints(source)[-1]), weights_hash(checkpoints(source)[-1]), str(data), "train", "")
    assert run.ancestors == (first, Ancestor(**EARLIER))


def test_ancestors_are_not_a_setting(tmp_path: Path, data: Path) -> None:
    assert not oracle_run(tmp_path / "run", data, "ancestors=[]").ancestors
    tree = {**ORACLE, "ancestors": [EARLIER]}
    assert not inherit(load_run(tree, [f"train.out={tmp_path / 'run'}", f"data.root={data}"])).ancestors


def test_a_trained_decoder_has_its_oracles_images_behind_it(held_out_lm: Path, tmp_path: Path) -> None:
    trained = {"model": {"decoder": "trained"}}
    source = rewritten(held_out_lm, tmp_path / "source", **trained)
    found = lineage(checkpoints(source)[-1])
    assert [Path(item.run).name for item in found] == [checkpoints(source)[-1].name, "oracle"]


def test_the_plugins_of_an_ancestor_are_not_imported(
    tmp_path: Path, data: Path, random_runs: tuple[Path, Path]
) -> None:
    source = rewritten(random_runs[0], tmp_path / "source", plugins=["strange_plugin"])
    assert oracle_run(tmp_path / "run", data, f"init_from={source}").ancestors


@pytest.mark.parametrize("split", ["train_split", "selection_split"])
def test_a_split_that_an_ancestor_has_seen_is_not_reported(
    tmp_path: Path, data: Path, random_runs: tuple[Path, Path], split: str
) -> None:
    source = rewritten(random_runs[0], tmp_path / "source", data={split: "val"})
    with pytest.raises(UserError, match=r"data.eval_split=val is reported, but .*/source/.* \(split val of "):
        oracle_run(tmp_path / "run", data, f"init_from={source}")


def test_other_data_than_an_ancestors_may_be_reported(
    tmp_path: Path, data: Path, random_runs: tuple[Path, Path]
) -> None:
    (tmp_path / "other").mkdir()
    seen = {"train_split": "val", "root": str(tmp_path / "other")}
    source = rewritten(random_runs[0], tmp_path / "source", data=seen)
    assert oracle_run(tmp_path / "run", data, f"init_from={source}").ancestors


def test_a_split_that_an_ancestor_was_trained_on_does_not_tune(tmp_path: Path, held_out_lm: Path) -> None:
    """Neither when the LM's own training left it out, nor as images called unseen."""
    root = yaml.safe_load((checkpoints(held_out_lm)[-1] / "config.yaml").read_text())["data"]["root"]
    ancestor = {**EARLIER, "data_root": root, "train_split": "train"}
    run = rewritten(held_out_lm, tmp_path / "lm", ancestors=[ancestor])
    assert tuning_split(checkpoints(held_out_lm)[-1]) == "holdout"
    with pytest.raises(UserError, match=r"runs/first, which this run started from, .* images of split holdout"):
        tuning_split(checkpoints(run)[-1])
    (tmp_path / "elsewhere").mkdir()
    moved = rewritten(
        held_out_lm, tmp_path / "moved", ancestors=[{**ancestor, "data_root": str(tmp_path / "elsewhere")}]
    )
    with pytest.raises(UserError, match="which this run started from"):
        tuning_split(checkpoints(moved)[-1], [f"data.root={tmp_path / 'elsewhere'}"], "train", unseen=True)


@pytest.mark.parametrize(
    ("one", "two", "same"),
    [("a/nyu", "a/nyu", True), ("nyu", "/x/nyu", True), ("a/nyu", "a/rooms", False), ("/gone/nyu", "rooms", False)],
)
def test_data_on_other_machines_are_compared_by_name(one: str, two: str, same: bool) -> None:
    assert same_data(one, two) == same


def test_two_folders_of_this_machine_are_different_data(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name / "nyu").mkdir(parents=True)
    assert not same_data(str(tmp_path / "a" / "nyu"), str(tmp_path / "b" / "nyu"))


def test_an_oracle_does_not_start_from_an_lm(
    tmp_path: Path, data: Path, random_runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "oracle.yaml"
    file.write_text(yaml.safe_dump(ORACLE))
    settings = [f"train.out={tmp_path / 'run'}", f"data.root={data}", f"init_from={random_runs[1]}"]
    assert "is a run of stage lm; give the run of an oracle" in failure(capsys, "train-oracle", file, *settings)


def test_a_missing_run_is_one_line(tmp_path: Path, data: Path) -> None:
    with pytest.raises(UserError, match="no_run: no such run or checkpoint directory"):
        oracle_run(tmp_path / "run", data, "init_from=no_run")


def test_a_resumed_run_keeps_what_it_started_from(tmp_path: Path, data: Path) -> None:
    trained = oracle_run(tmp_path / "run", data)
    assert isinstance(trained, OracleRun)
    with pytest.raises(UserError, match="init_from=runs/x .*a run keeps its model"):
        check_resume(replace(trained, init_from="runs/x"), trained)
    with pytest.raises(UserError, match="a trained model cannot change these"):
        check_overrides(replace(trained, init_from="runs/x"), trained)


def test_tuning_a_decoder_takes_no_other_weights() -> None:
    run = load_run(LM, ["oracle=x", "train.out=x", "init_from=y", "decoder_tuning.run=z", "model.decoder=trained"])
    with pytest.raises(UserError, match="init_from=y has no effect with decoder_tuning.run"):
        validate(run := replace(run, loss=replace(run.loss, task_weight=1.0)))  # pyright: ignore


@pytest.mark.slow
def test_an_lm_can_be_trained_on_an_oracle_from_a_hub(hub: FakeHub, uploads: Path, tmp_path: Path, data: Path) -> None:
    hub.add_folder("ann/oracle", uploads / "oracle")
    out = save_untrained(lm_run(tmp_path / "lm", Path("hub:ann/oracle"), f"data.root={data}"))
    assert weights_hash(out / "oracle") == weights_hash(uploads / "oracle")
