"""What `train.resume` and `key=value` on a trained run refuse, and what they list."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.runs import fit_run, sign
from tests.support.small import lm_run, oracle_run
from uvim_fsq.checkpoints import files as ckpt
from uvim_fsq.checkpoints.identity import check_resume, describe_overrides, differences, flatten, same_folder
from uvim_fsq.checkpoints.loading import load_checkpoint
from uvim_fsq.cli import main
from uvim_fsq.config.schema import EvalConfig, LMRun, TrainConfig
from uvim_fsq.errors import UserError
from uvim_fsq.evaluation.run import evaluate
from uvim_fsq.inference.predictor import Predictor


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory, oracle_dir: Path) -> Path:
    """A trained oracle's run that may be copied."""
    return shutil.copytree(oracle_dir, tmp_path_factory.mktemp("half") / "run")


def refusal(make: Any, run_dir: Path, source: Path, *overrides: str) -> str:
    before = (run_dir / "config.yaml").read_bytes(), (run_dir / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError) as caught:
        fit_run(make(run_dir, source, "train.resume=auto", *overrides))
    assert ((run_dir / "config.yaml").read_bytes(), (run_dir / "metrics.jsonl").read_bytes()) == before
    return str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.quantizer.levels=[25]", "model.quantizer.levels=[25] (trained with [5, 5])"),
        ("model.quantizer.shift=centered", "model.quantizer.shift=centered (trained with published)"),
        ("model.num_heads=4", "model.num_heads=4 (trained with 2)"),
        ("model.code_length=1", "model.code_length=1 (trained with 4)"),
        ("model.code_dropout=none", "model.code_dropout=none (trained with random)"),
        ("task.max_depth=5", "task.max_depth=5.0 (trained with 10.0)"),
        ("task.missing=void", "task.missing=void (trained with bin0)"),
        ("data.image_size=32", "data.image_size=32 (trained with 16)"),
    ],
)
def test_resume_keeps_model_and_labels(half: Path, data: Path, override: str, said: str) -> None:
    # Also when changes are asked for.
    for more in ((), ("train.resume_changes=true",)):
        message = refusal(oracle_run, half, data, override, *more)
        assert said in message and "train.out" in message


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.seed=1", "train.seed=1 (was 0)"),
        ("train.batch_size=4", "train.batch_size=4 (was 8)"),
        ("optim.lr=0.5", "optim.lr=0.5 (was 0.001)"),
        ("optim.betas=[0.5,0.9]", "optim.betas=[0.5, 0.9] (was [0.9, 0.95])"),
        ("train.steps=9", "train.steps=9 (was 6)"),
        ("train.ema=0.9", "train.ema=0.9 (was null)"),
        ("data.hflip=false", "data.hflip=false (was true)"),
        ("data.selection_split=train", "data.selection_split=train (was '')"),
        ("task.decoding=expectation", "task.decoding=expectation (was argmax)"),
        ("eval.temperature=0.5", "eval.temperature=0.5 (was 0.0)"),
    ],
)
def test_other_changes_on_resume_are_listed(half: Path, data: Path, override: str, said: str) -> None:
    message = refusal(oracle_run, half, data, override, "train.log_every=3")
    assert said in message and "train.resume_changes=true" in message and "log_every" not in message


def test_all_changes_are_listed_at_once_and_can_be_asked_for(tmp_path: Path, half: Path, data: Path) -> None:
    run_dir = shutil.copytree(half, tmp_path / "run")
    changes = ("train.steps=8", "optim.lr=0.01", "train.batch_size=4")
    message = refusal(oracle_run, run_dir, data, *changes)
    assert all(key in message for key in ("train.steps=8 (was 6)", "optim.lr=0.01", "train.batch_size=4"))
    fit_run(oracle_run(run_dir, data, "train.resume=auto", "train.resume_changes=true", *changes))
    assert ckpt.checkpoints(run_dir)[-1].name == ckpt.step_name(8)
    assert yaml.safe_load((ckpt.checkpoints(run_dir)[-1] / "config.yaml").read_text())["optim"]["lr"] == 0.01


def test_the_optimizer_cannot_change_and_steps_cannot_be_undone(half: Path, data: Path) -> None:
    for more in ((), ("train.resume_changes=true",)):
        message = refusal(oracle_run, half, data, "optim.name=adafactor", *more)
        assert "optim.name=adafactor (trained with adamw)" in message
    message = refusal(oracle_run, half, data, "train.steps=4", "train.resume_changes=true")
    assert "step 6" in message and "4 steps" in message


def test_keys_that_change_no_result_may_change(tmp_path: Path, half: Path, data: Path) -> None:
    run_dir = shutil.copytree(half, tmp_path / "run")
    moved = shutil.copytree(run_dir / "checkpoints" / ckpt.step_name(6), tmp_path / "step")
    free = ("data.cache=true", "data.max_bad_samples=3", "train.log_every=2", "train.save_every=3", "train.keep=9")
    free += ("train.accumulate=2", "eval.batch_size=3", f"train.resume={moved}")
    assert fit_run(oracle_run(tmp_path / "elsewhere", data, *free)) == tmp_path / "elsewhere"
    # The same folder under another name is the same data.
    (tmp_path / "link").symlink_to(data)
    fit_run(oracle_run(run_dir, tmp_path / "link", "train.resume=auto"))
    other = shutil.copytree(data, tmp_path / "other")
    assert f"data.root={other} (was {data})" in refusal(oracle_run, run_dir, other)


def test_a_preset_equals_its_levels_and_missing_keys_equal_their_defaults(tmp_path: Path, data: Path) -> None:
    out = tmp_path / "run"
    fit_run(oracle_run(out, data, "model.quantizer.levels=2^8"))
    (checkpoint,) = ckpt.checkpoints(out)
    tree = yaml.safe_load((checkpoint / "config.yaml").read_text())
    # As a version wrote it that knew fewer keys.
    for section, key in (("data", "selection_split"), ("train", "resume_changes"), ("task", "decoding")):
        del tree[section][key]
    del tree["model"]["quantizer"]["shift"]
    (checkpoint / "config.yaml").write_text(yaml.safe_dump(tree))
    sign(checkpoint)
    fit_run(oracle_run(out, data, "model.quantizer.levels=[8,6,5]", "train.resume=auto"))


def test_resume_keeps_an_lms_architecture_and_its_oracles_labels(lm_dir: Path, oracle_dir: Path) -> None:
    for override, said in (
        ("model.num_heads=4", "model.num_heads=4 (trained with 2)"),
        ("model.encoder.act_layer=gelu_tanh", "model.encoder.act_layer=gelu_tanh (trained with default)"),
        ("optim.encoder_layer_decay=0.5", "optim.encoder_layer_decay=0.5 (trained with 1.0)"),
    ):
        assert said in refusal(lm_run, lm_dir, oracle_dir, override)
    with pytest.raises(UserError, match=r"task\.max_depth=5\.0.* 10\.0"):
        lm_run(lm_dir, oracle_dir, "task.max_depth=5")


def test_the_source_of_the_first_weights_may_change_on_request(tmp_path: Path, random_runs: tuple[Path, Path]) -> None:
    trained = lm_run(tmp_path, random_runs[0])
    assert isinstance(trained, LMRun)
    encoder = replace(trained.model.encoder, weights="hub")
    asked = replace(trained, model=replace(trained.model, encoder=encoder))
    with pytest.raises(UserError, match="model.encoder.weights=hub .was none.; leave them as they were, or continue"):
        check_resume(asked, trained)
    check_resume(replace(asked, train=replace(asked.train, resume_changes=True)), trained)


def test_what_is_no_setting_is_not_compared(tmp_path: Path, random_runs: tuple[Path, Path]) -> None:
    run = lm_run(tmp_path, random_runs[0])
    assert isinstance(run, LMRun)
    assert "given" not in flatten(run) and flatten(run)["task.max_depth"] == 10.0
    assert differences(run, replace(run, given=("root",))) == {}


def test_an_empty_setting_is_shown_as_such() -> None:
    found = describe_overrides({"a": ("", "x"), "b": (None, [1, 2]), "c": (0.5, "")})
    assert found == "a=x (trained with ''), b=[1, 2] (trained with null), c='' (trained with 0.5)"


def test_folders_that_do_not_exist_are_not_the_same(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    assert same_folder(str(tmp_path), str(tmp_path / "link"))
    assert not same_folder(str(tmp_path), str(tmp_path / "no")) and not same_folder("no", "no")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.num_heads=4", "model.num_heads=4 (trained with 2)"),
        ("model.quantizer.levels=[25]", "model.quantizer.levels=[25] (trained with [5, 5])"),
        ("model.quantizer.shift=centered", "model.quantizer.shift=centered (trained with published)"),
        ("task.num_bins=8", "task.num_bins=8 (trained with 16)"),
        ("task.max_depth=5", "task.max_depth=5.0 (trained with 10.0)"),
        ("data.image_size=32", "data.image_size=32 (trained with 16)"),
        ("model.width=32", "model.width=32 (trained with 16)"),
    ],
)
def test_a_trained_oracles_model_and_task_cannot_change(oracle_dir: Path, override: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        load_checkpoint(oracle_dir, [override])
    assert said in str(caught.value) and "cannot change" in str(caught.value)


@pytest.mark.parametrize("override", ["eval.codes=soft", "eval.code_scale=0.5", "eval.samples=4", "eval.top_k=3"])
def test_settings_of_predicted_tokens_are_refused_for_an_oracle(oracle_dir: Path, override: str) -> None:
    with pytest.raises(UserError, match=f"^{override.partition('=')[0]}: an oracle predicts no tokens"):
        load_checkpoint(oracle_dir, [override])


def test_a_trained_lms_model_and_task_cannot_change(lm_dir: Path, tmp_path: Path, oracle_dir: Path) -> None:
    for override in ("model.num_heads=4", "task.max_depth=5", "data.image_size=32", f"oracle={tmp_path}"):
        with pytest.raises(UserError, match="cannot change"):
            Predictor.from_run(lm_dir, [override])
    # Only where the run has lost its own copy may another place be named.
    moved = shutil.copytree(lm_dir, tmp_path / "moved")
    shutil.move(moved / "oracle", tmp_path / "oracle")
    Predictor.from_run(moved, [f"oracle={tmp_path / 'oracle'}"])


@pytest.mark.slow
def test_every_result_names_its_overrides(tmp_path: Path, lm_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = evaluate(lm_dir, ["eval.temperature=0.7", "eval.seed=0", "task.decoding=expectation"], limit=2)
    expected = {"eval.limit": [None, 2], "eval.temperature": [0.0, 0.7], "task.decoding": ["argmax", "expectation"]}
    assert result["overrides"] == expected and result["limit"] == 2
    assert evaluate(lm_dir)["overrides"] == {}
    main(["evaluate", str(lm_dir), "eval.temperature=0.7", "--limit", "2", "--json", str(tmp_path / "x.json")])
    assert "eval.temperature=0.7 (trained with 0.0)" in " ".join(capsys.readouterr().out.split())
    main(["analyze", str(lm_dir), "eval.seed=3", "--out", str(tmp_path / "analysis")])
    assert json.loads((tmp_path / "analysis/analysis.json").read_text())["overrides"] == {"eval.seed": [0, 3]}
    assert "eval.seed=3 (trained with 0)" in (tmp_path / "analysis/report.html").read_text()


def test_the_free_keys_are_these() -> None:
    """A new key must be put on one side or the other; this names those that are free."""
    from uvim_fsq.checkpoints.identity import FREE

    assert {key for key in FREE if key.startswith("train.")} == {
        "train.out", "train.resume", "train.resume_changes", "train.log_every", "train.save_every", "train.keep",
        "train.trackers", "train.wandb", "train.compile", "train.accumulate",
    }  # fmt: skip
    assert {key for key in FREE if key.startswith("eval.")} == {
        "eval.batch_size", "eval.workers", "eval.compile", "eval.tuned",
    }  # fmt: skip
    for section, cls in (("train", TrainConfig), ("eval", EvalConfig)):
        known = {f"{section}.{name}" for name in cls.__dataclass_fields__}
        assert {key for key in FREE if key.startswith(f"{section}.")} <= known
    assert replace(TrainConfig(), resume_changes=True) != TrainConfig()
