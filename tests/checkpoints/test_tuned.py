"""When tuned settings apply, and which images may tune a run."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.cli import failure
from tests.support.decoder_tuning import tuning_run
from tests.support.runs import save_untrained
from tests.support.small import lm_run
from tests.support.tuning import DEFAULT, SETTINGS, write_tuned
from uvim_fsq.checkpoints.identity import check_resume
from uvim_fsq.checkpoints.loading import load_checkpoint
from uvim_fsq.checkpoints.run_directory import checkpoints, read_config
from uvim_fsq.checkpoints.tuned import TUNED_KEYS, read_for_prediction, tuning_split
from uvim_fsq.errors import UserError
from uvim_fsq.tasks.nyu_depth.task import NYUDepth
from uvim_fsq.training.run import train


@pytest.fixture
def run_dir(tmp_path: Path, held_out_lm: Path) -> Path:
    return shutil.copytree(held_out_lm, tmp_path / "run")


def used(run_dir: Path, *overrides: str) -> dict[str, Any]:
    config = load_checkpoint(run_dir, overrides).run.eval
    return {key: getattr(config, key) for key in TUNED_KEYS}


def test_tuned_settings_apply_and_count_as_overrides(run_dir: Path) -> None:
    plain = load_checkpoint(run_dir)
    assert plain.decoding_from == "the run" and not plain.overrides
    write_tuned(run_dir)
    assert used(run_dir) == {**DEFAULT, **SETTINGS}
    loaded = load_checkpoint(run_dir)
    assert loaded.decoding_from == "tuned on holdout, 5 images"
    assert {key: now for key, (_, now) in loaded.overrides.items()} == {f"eval.{k}": v for k, v in SETTINGS.items()}
    trained = replace(loaded.run.eval, codes="hard", code_scale=1.0, context_weight=0.0)
    assert replace(trained, samples=1, temperature=0.0, top_k=None) == plain.run.eval


def test_given_keys_take_precedence(run_dir: Path) -> None:
    write_tuned(run_dir)
    assert used(run_dir, "eval.code_scale=0.9") == {**DEFAULT, **SETTINGS, "code_scale": 0.9}
    loaded = load_checkpoint(run_dir, ["eval.code_scale=0.9", "eval.codes=hard", "eval.samples=2"])
    assert loaded.decoding_from == "tuned on holdout, 5 images, except for codes, code_scale"


@pytest.mark.slow
def test_tuned_settings_can_be_ignored(run_dir: Path) -> None:
    file = write_tuned(run_dir)
    for content in (file.read_text(), "damaged"):
        file.write_text(content)
        loaded = load_checkpoint(run_dir, ["eval.tuned=false", "eval.temperature=0"])
        assert loaded.decoding_from == "the run" and not loaded.overrides
        assert used(run_dir, "eval.tuned=false")["codes"] == "hard"


def test_a_conflict_with_tuned_settings_names_their_file(run_dir: Path) -> None:
    file = write_tuned(run_dir)
    with pytest.raises(UserError) as caught:
        read_for_prediction(file.parent, ["eval.temperature=0"])
    assert "eval.samples=2 with eval.temperature=0: " in str(caught.value)
    assert f"{file}, which eval.tuned=false ignores" in str(caught.value)
    with pytest.raises(UserError) as caught:
        read_for_prediction(file.parent, ["eval.limit=-1"])
    assert "decoding.json" not in str(caught.value), "a mistake that has nothing to do with them"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"settings": {"codes": "both"}}, "damaged .codes="),
        ({"settings": {"code_scale": "${oc.env:HOME}"}}, "damaged .code_scale="),
        ({"settings": {"precision": "bf16"}}, "damaged"),
        ({"settings": []}, "damaged"),
        ({"split": None}, "damaged"),
        ({"images": "many"}, "damaged"),
        ({"checkpoint_sha256": "0" * 64}, "was tuned for another checkpoint"),
    ],
)
def test_a_damaged_or_foreign_file_is_refused(run_dir: Path, changes: dict[str, Any], message: str) -> None:
    file = write_tuned(run_dir)
    record = json.loads(file.read_text())
    if isinstance(changes.get("settings"), dict):
        changes = {"settings": record["settings"] | changes["settings"]}
    file.write_text(json.dumps(record | changes))
    remedy = "run `uvim-fsq tune` again, or delete the file"
    with pytest.raises(UserError, match=f"{re.escape(str(file))} .*{message}.*{remedy}"):
        load_checkpoint(run_dir)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}"])
def test_a_file_that_is_no_record_is_refused(run_dir: Path, text: str) -> None:
    write_tuned(run_dir).write_text(text)
    with pytest.raises(UserError, match="decoding.json is damaged .*; run `uvim-fsq tune` again, or delete the file"):
        load_checkpoint(run_dir)


def test_tuned_values_out_of_range_are_refused(run_dir: Path) -> None:
    write_tuned(run_dir, {"context_weight": 3.0})
    with pytest.raises(UserError, match="eval.context_weight=3.0: must be at most 1 .*eval.tuned=false ignores"):
        load_checkpoint(run_dir)


@pytest.mark.slow
def test_the_images_of_the_tuning_are_not_evaluated_with_it(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tuned(run_dir)
    with pytest.raises(UserError, match=r"decoding.json was tuned on holdout, .*; set eval.tuned=false"):
        load_checkpoint(run_dir, ["data.eval_split=holdout"])
    said = failure(capsys, "evaluate", run_dir, "data.eval_split=holdout")
    assert "was tuned on holdout" in said
    load_checkpoint(run_dir, ["data.eval_split=holdout", "eval.tuned=false"])
    # Other data has a split of the same name.
    write_tuned(run_dir, split="val", other_root=str(tmp_path))
    assert used(run_dir)["codes"] == "soft"
    assert load_checkpoint(run_dir).decoding_from == f"tuned on val of {tmp_path}, 5 images"
    with pytest.raises(UserError, match="was tuned on val, the split to evaluate"):
        load_checkpoint(run_dir, [f"data.root={tmp_path}"])


def test_settings_tuned_by_another_metric_are_refused(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tuned(run_dir)
    monkeypatch.setattr(NYUDepth, "choosing_metric", None)
    with pytest.raises(UserError, match=r"was tuned by rmse, but .* reports another metric; set eval.tuned=false"):
        load_checkpoint(run_dir)


@pytest.mark.slow
def test_training_does_not_see_tuned_settings(tmp_path: Path, lm_dir: Path, oracle_dir: Path) -> None:
    run = shutil.copytree(lm_dir, tmp_path / "run")
    write_tuned(run)
    trained = read_config(checkpoints(run)[-1])
    check_resume(replace(trained, eval=replace(trained.eval, tuned=False)), trained)
    (run / "evaluation.json").unlink()
    train(lm_run(run, oracle_dir, "train.resume=auto"))
    result = json.loads((run / "evaluation.json").read_text())
    assert result["decoding"]["codes"] == "hard" and result["decoding_from"] == "the run"
    assert not result["overrides"]


def test_the_hold_out_of_training_is_the_default(held_out_lm: Path) -> None:
    checkpoint = checkpoints(held_out_lm)[-1]
    assert tuning_split(checkpoint) == tuning_split(checkpoint, split="holdout") == "holdout"


@pytest.mark.parametrize(
    ("overrides", "split", "message"),
    [
        ([], "val", r"split val is the one that is reported .data.eval_split."),
        (["data.eval_split=holdout"], "holdout", "split holdout is the one that is reported"),
        (["data.eval_split=holdout"], "val", "split val is the one that is reported"),
        (["data.root=moved"], "val", "split val is the one that is reported"),
        ([], "train_minus_holdout", r"the LM was trained on images of split train_minus_holdout"),
        ([], "train", r"the LM was trained on images of split train .data.train_split=train_minus_holdout."),
        (["data.train_split=val"], "train", r"the LM was trained on images of split train "),
        (["data.selection_split=''"], None, "was trained without a hold-out .data.selection_split is empty."),
    ],
)
def test_images_that_may_not_tune_are_refused(
    held_out_lm: Path, overrides: list[str], split: str | None, message: str
) -> None:
    with pytest.raises(UserError, match=f"{message}.*: train both stages with data.train_split=train_minus_holdout"):
        tuning_split(checkpoints(held_out_lm)[-1], overrides, split)


def test_the_oracles_training_images_do_not_tune(tmp_path: Path, data: Path, random_runs: tuple[Path, Path]) -> None:
    splits = ("data.train_split=train_minus_holdout", "data.selection_split=holdout")
    lm = save_untrained(lm_run(tmp_path / "lm", random_runs[0], *splits))
    with pytest.raises(UserError, match=r"its oracle was trained on images of split holdout .data.train_split=train."):
        tuning_split(checkpoints(lm)[-1])


def test_images_of_an_lm_whose_decoder_was_tuned_do_not_tune(tmp_path: Path, held_out_lm: Path) -> None:
    oracle, hold_out = held_out_lm / "oracle", "data.selection_split=holdout"
    lm = save_untrained(lm_run(tmp_path / "lm", oracle, "data.train_split=train"))
    kept = ("data.train_split=train_minus_holdout", hold_out)
    once = save_untrained(tuning_run(tmp_path / "once", lm, *kept))
    shutil.rmtree(lm)
    twice = save_untrained(tuning_run(tmp_path / "twice", once, *kept))
    for run in (once, twice):
        with pytest.raises(UserError, match=r"/lm/checkpoints/.*, which this run started .* of split holdout "):
            tuning_split(checkpoints(run)[-1])
    # Nor can the record be overridden.
    with pytest.raises(UserError, match="ancestors=.* cannot change"):
        tuning_split(checkpoints(once)[-1], ["ancestors=[]"])
    clean = save_untrained(tuning_run(tmp_path / "clean", held_out_lm, *kept))
    assert tuning_split(checkpoints(clean)[-1]) == "holdout"


def test_other_images_may_tune_if_the_user_says_so(tmp_path: Path, random_runs: tuple[Path, Path]) -> None:
    checkpoint, other = checkpoints(random_runs[1])[-1], f"data.root={tmp_path}"
    assert tuning_split(checkpoint, [other], unseen=True) == "val"
    assert tuning_split(checkpoint, [other], "train", unseen=True) == "train"
    with pytest.raises(UserError, match="--unseen needs other data than the run's: data.root=FOLDER"):
        tuning_split(checkpoint, unseen=True)


def test_an_oracle_has_nothing_to_tune(random_runs: tuple[Path, Path]) -> None:
    checkpoint = checkpoints(random_runs[0])[-1]
    with pytest.raises(UserError, match="is of stage oracle, which predicts no tokens; give the run of an LM"):
        tuning_split(checkpoint, split="holdout")
