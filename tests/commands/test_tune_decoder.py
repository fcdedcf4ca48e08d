"""`uvim-fsq tune-decoder`: a run with the token model of another and a decoder of its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.cli import failure
from tests.support.runs import last_weights, losses, save_untrained
from tests.support.small import lm_run
from uvim_fsq.checkpoints.run_directory import checkpoints, file_hash, read_config
from uvim_fsq.cli import main
from uvim_fsq.config.schema import LMRun, Run

SHORT = ["train.steps=4", "train.batch_size=4", "optim.lr=0.01", "optim.warmup_steps=0"]


@pytest.fixture
def run_dir(tmp_path: Path, held_out_lm: Path) -> Path:
    return shutil.copytree(held_out_lm, tmp_path / "run")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[LMRun]:
    """The configurations that would have been trained."""
    runs: list[LMRun] = []

    def keep(run: Run, source: str) -> Path:
        assert isinstance(run, LMRun)
        runs.append(run)
        return Path(run.train.out)

    monkeypatch.setattr("uvim_fsq.commands.tune_decoder.train_run", keep)
    return runs


def hashes(folder: Path) -> dict[Path, str]:
    """File -> SHA-256, without the lock that whoever opens a run for training leaves."""
    return {file: file_hash(file) for file in folder.rglob("*") if file.is_file() and file.name != ".lock"}


@pytest.mark.slow
def test_the_result_is_a_run_that_evaluate_and_predict_use(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = hashes(run_dir)
    main(["tune-decoder", str(run_dir), *SHORT])
    said = capsys.readouterr().out
    new = tmp_path / "run_decoder"
    assert hashes(run_dir) == before
    assert f"trained: {new}" in said and f"next: uvim-fsq predict {new} PHOTOS" in said
    assert "step 0 of 4" in said
    result = json.loads((new / "evaluation.json").read_text())
    assert result["data"]["split"] == "val" and not result["overrides"]
    shutil.move(run_dir, tmp_path / "moved")  # the new run needs nothing of the old one
    main(["evaluate", str(new), "--json", str(tmp_path / "again.json")])
    assert json.loads((tmp_path / "again.json").read_text())["figures"] == result["figures"]
    main(["evaluate", str(tmp_path / "moved"), "--json", str(tmp_path / "old.json")])
    old = json.loads((tmp_path / "old.json").read_text())["figures"]
    assert old["lm"] != result["figures"]["lm"] and old["oracle"] == result["figures"]["oracle"]
    photo = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3)).astype(np.uint8)).save(photo)
    for name, run in (("one", tmp_path / "moved"), ("two", new)):
        main(["predict", str(run), str(photo), "--out", str(tmp_path / name)])
    one, two = (np.load(next((tmp_path / name).rglob("*.npy"))) for name in ("one", "two"))
    assert not np.array_equal(one, two)


@pytest.mark.slow
def test_an_interrupted_tuning_continues_with_the_same_command(run_dir: Path, tmp_path: Path) -> None:
    command = ["tune-decoder", str(run_dir), *SHORT, "train.save_every=2", "train.keep=2"]
    main(command)
    new = tmp_path / "run_decoder"
    whole, logged = last_weights(new), losses(new)
    shutil.rmtree(checkpoints(new)[-1])
    (new / "evaluation.json").unlink()
    main([*command, "train.resume=auto"])
    again = last_weights(new)
    assert all(bool((again[name] == whole[name]).all()) for name in whole) and losses(new) == logged
    assert (new / "evaluation.json").exists()


@pytest.mark.slow
def test_a_tuned_decoder_can_be_tuned_further(run_dir: Path, tmp_path: Path) -> None:
    main(["tune-decoder", str(run_dir), *SHORT])
    first = tmp_path / "run_decoder"
    main(["tune-decoder", str(first), "--split", "train", *SHORT])
    one, two = last_weights(first), last_weights(tmp_path / "run_decoder_decoder")
    moved = {name for name in one if not bool((one[name] == two[name]).all())}
    assert moved and all(name.startswith("label_decoder.") for name in moved)


def test_by_default_a_tenth_of_the_steps_on_the_hold_out(
    tmp_path: Path, held_out_lm: Path, asked: list[LMRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = ["train.steps=404", "train.eval_every=100", "train.save_every=50", "optim.lr=0.4", "train.ema=0.9"]
    lm = save_untrained(lm_run(tmp_path / "lm", held_out_lm / "oracle", *keys, "optim.weight_decay=0.1"))
    monkeypatch.chdir(tmp_path)
    main(["tune-decoder", "lm"])
    (run,) = asked
    assert run.train.steps == 40 and run.train.epochs is None
    assert run.optim.warmup_steps == 4 and run.optim.lr == 0.2 and run.optim.weight_decay == 0
    assert run.train.eval_every is None and run.train.save_every is None and run.train.resume == "no"
    assert run.train.ema == 0.9
    assert run.data.train_split == "holdout" and run.data.selection_split == "" and run.data.eval_split == "val"
    assert run.model.decoder == "trained" and run.loss.task_weight == 1
    assert run.train.out == str(tmp_path / "lm_decoder")
    assert Path(run.oracle).samefile(lm / "oracle")
    assert run.decoder_tuning.true_share == 0.25
    assert Path(run.decoder_tuning.run).samefile(checkpoints(lm)[-1])


def test_a_checkpoint_can_be_given(run_dir: Path, asked: list[LMRun]) -> None:
    checkpoint = checkpoints(run_dir)[-1]
    main(["tune-decoder", str(checkpoint)])
    assert asked[0].train.out == f"{run_dir}_decoder" and asked[0].decoder_tuning.run == str(checkpoint)
    assert asked[0].train.steps == 1, "at least one"


def test_a_task_weight_of_training_is_kept(tmp_path: Path, held_out_lm: Path, asked: list[LMRun]) -> None:
    run = save_untrained(lm_run(tmp_path / "lm", held_out_lm / "oracle", "loss.task_weight=3"))
    main(["tune-decoder", str(run)])
    assert asked[0].loss.task_weight == 3


@pytest.mark.parametrize(
    ("overrides", "steps", "epochs", "warmup"),
    [
        ([], None, 3.0, 0),
        (["train.steps=50"], 50, None, 5),
        (["train.epochs=2"], None, 2.0, 0),
        (["train.steps=50", "optim.warmup_steps=7"], 50, None, 7),
        (["train.steps=50", "train.epochs=null"], 50, None, 5),
    ],
)
def test_the_length_of_a_run_in_epochs(
    tmp_path: Path,
    held_out_lm: Path,
    asked: list[LMRun],
    overrides: list[str],
    steps: int | None,
    epochs: float | None,
    warmup: int,
) -> None:
    keys = ["train.steps=null", "train.epochs=30"]
    main(["tune-decoder", str(save_untrained(lm_run(tmp_path / "lm", held_out_lm / "oracle", *keys))), *overrides])
    (run,) = asked
    assert (run.train.steps, run.train.epochs, run.optim.warmup_steps) == (steps, epochs, warmup)


def test_a_run_in_steps_can_be_tuned_for_epochs(run_dir: Path, asked: list[LMRun]) -> None:
    main(["tune-decoder", str(run_dir), "train.epochs=5"])
    assert asked[0].train.steps is None and asked[0].train.epochs == 5


@pytest.mark.slow
def test_a_run_is_tuned_for_epochs(run_dir: Path, tmp_path: Path) -> None:
    main(["tune-decoder", str(run_dir), "train.epochs=2.4", "train.batch_size=4"])
    images = len(holdout_of(run_dir))
    assert checkpoints(tmp_path / "run_decoder")[-1].name == f"step_{round(2.4 * (images // 4)):08d}"


def holdout_of(run_dir: Path) -> range:
    """The images of the hold-out, as evaluation counts them."""
    run = read_config(checkpoints(run_dir)[-1])
    from uvim_fsq.checkpoints.loading import build_task

    return range(len(build_task(run).source(run.data.root, "holdout")))


def test_settings_after_the_run_replace_the_commands_own(run_dir: Path, asked: list[LMRun]) -> None:
    given = ["train.out=elsewhere", "optim.lr=0.3", "decoder_tuning.true_share=0.5", "eval.codes=soft"]
    main(["tune-decoder", str(run_dir), *given, "model.decoder_context=encoder"])
    (run,) = asked
    assert (run.train.out, run.optim.lr, run.decoder_tuning.true_share) == ("elsewhere", 0.3, 0.5)
    assert run.eval.codes == "soft" and run.model.decoder_context == "encoder"


def test_the_images_of_training_serve_if_they_are_asked_for(random_runs: tuple[Path, Path], asked: list[LMRun]) -> None:
    main(["tune-decoder", str(random_runs[1]), "--split", "train"])
    assert asked[0].data.train_split == "train"


def test_a_decoder_tuned_on_the_lms_own_images_leaves_its_hold_out_for_tune(run_dir: Path, asked: list[LMRun]) -> None:
    main(["tune-decoder", str(run_dir), "--split", "train_minus_holdout"])
    main(["tune-decoder", str(run_dir), "--split", "train"])
    kept, mixed = (run.data for run in asked)
    assert (kept.train_split, kept.selection_split) == ("train_minus_holdout", "holdout")
    assert (mixed.train_split, mixed.selection_split) == ("train", "")


@pytest.mark.parametrize("name", ["a #b: [c]", "1e3", "x=y", "null", "zwölf 🪑 'dreizehn\""])
def test_any_folder_name_will_do(
    tmp_path: Path, run_dir: Path, asked: list[LMRun], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    shutil.copytree(run_dir, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    main(["tune-decoder", f"./{name}"])
    assert asked[0].train.out == str(tmp_path / f"{name}_decoder")
    assert Path(asked[0].decoder_tuning.run).is_dir() and Path(asked[0].oracle).is_dir()


HOLD_OUT = "train both stages with data.train_split=train_minus_holdout data.selection_split=holdout"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--split", "val"], "split val is the one that is reported (data.eval_split), so it must not serve to tune:"),
        (["data.train_split=val"], "data.train_split=val: name the images to train on with --split instead"),
        (["data.eval_split=holdout"], "data.eval_split=holdout is reported, but the decoder would be trained on its"),
        (["--split", "train", "data.eval_split=holdout"], "(split train); report another split, or name another"),
        (["decoder_tuning.true_share=2"], "decoder_tuning.true_share=2.0: must be at most 1"),
        (["decoder_tuning.true_share=-1"], "decoder_tuning.true_share=-1.0: must not be negative"),
        (["decoder_tuning.true_share=nan"], "decoder_tuning.true_share=nan: must be finite"),
        (["decoder_tuning.true_share=half"], "decoder_tuning.true_share"),
        (["model.depth=2"], "has another token model; leave model.* as it was, except for decoder_context"),
        (["model.kind=masked"], "has another token model; leave model.* as it was"),
        (
            ["model.decoder=frozen"],
            "decoder_tuning.run trains a copy of the oracle's decoder; set model.decoder=traine",
        ),
        (["loss.task_weight=0"], "learns from the task loss alone; set loss.task_weight above 0"),
        (["oracle=nowhere"], "oracle=nowhere: no such run or checkpoint directory"),
        (["data.image_size=32"], "data.image_size=32 but the oracle"),
        (["train.steps=4", "train.epochs=1"], "give exactly one of train.epochs and train.steps"),
        (["true_share=0.5"], "true_share"),
        (["eval.steps=3"], "eval.steps=3: model.kind=autoregressive does not decode in steps"),
        (
            ["decoder_tuning.run=nowhere"],
            "decoder_tuning.run is the LM that the command is given",
        ),
        (["decoder_tuning.run="], "leave this key out"),
        (["stage=oracle"], "unknown key oracle"),
    ],
)
def test_mistakes_are_one_line(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert message in failure(capsys, "tune-decoder", run_dir, *arguments)
    assert not (tmp_path / "run_decoder").exists()


def test_the_remedies_are_those_of_the_command(
    random_runs: tuple[Path, Path], run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in ([random_runs[1]], [run_dir, "--split", "val"], [random_runs[1], "--split", "holdout"]):
        said = failure(capsys, "tune-decoder", *arguments)
        assert HOLD_OUT in said and "--split train, the images of training, augmented" in said
        assert "--unseen" not in said
    assert "was trained without a hold-out (data.selection_split is empty)" in failure(
        capsys, "tune-decoder", random_runs[1]
    )


def test_only_an_lms_run_has_tokens_to_predict(
    random_runs: tuple[Path, Path], direct_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    oracle = random_runs[0]
    assert f"{oracle} is of stage oracle; give the run of an LM" in failure(capsys, "tune-decoder", oracle)
    assert f"{direct_dir} is of stage direct; give the run of an LM" in failure(capsys, "tune-decoder", direct_dir)
    missing = tmp_path / "missing"
    assert f"{missing}: no such run or checkpoint directory" in failure(capsys, "tune-decoder", missing)


def test_another_oracle_is_refused(run_dir: Path, oracle_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = failure(capsys, "tune-decoder", run_dir, f"oracle={oracle_dir}", *SHORT)
    assert f"was trained on another oracle than oracle={oracle_dir}; leave oracle= out" in said


def test_the_context_of_a_trained_decoder_stays(
    tmp_path: Path, held_out_lm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = ["model.decoder=trained", "model.decoder_context=encoder", "loss.task_weight=1"]
    lm = save_untrained(lm_run(tmp_path / "lm", held_out_lm / "oracle", *keys))
    said = failure(capsys, "tune-decoder", lm, "model.decoder_context=pixels")
    assert "has a trained decoder with model.decoder_context=encoder, which cannot change; leave it as it was" in said


@pytest.mark.parametrize("resume", ["no", "auto"])
def test_no_run_is_overwritten(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], resume: str) -> None:
    """Neither one in the default folder nor the LM's own."""
    before = hashes(run_dir)
    other = shutil.copytree(run_dir, tmp_path / "run_decoder")
    for out in (run_dir, other):
        said = failure(capsys, "tune-decoder", run_dir, f"train.out={out}", f"train.resume={resume}", *SHORT)
        wanted = {"no": f"{out} already holds checkpoints; continue with train.resume=auto or choose another train.out"}
        assert wanted.get(resume, "or start a new run with another train.out") in said
    assert hashes(run_dir) == before


def test_a_folder_with_other_files_is_refused(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = run_dir / "file"
    place.touch()
    assert str(place) in failure(capsys, "tune-decoder", run_dir, f"train.out={place}")
