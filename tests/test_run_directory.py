"""What a run directory holds: its result, nothing that is not finite, an LM's own oracle, one training at a time."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.runs import CHANGED, STEPS, another_process, at, fitted, outcome, weights
from tests.support.small import lm_run, oracle_run
from uvim_fsq.checkpoints import files as ckpt
from uvim_fsq.checkpoints.loading import load_checkpoint
from uvim_fsq.checkpoints.run_directory import checkpoints, file_hash, recorded_hashes, step_name
from uvim_fsq.errors import UserError
from uvim_fsq.evaluation.run import evaluate
from uvim_fsq.files import read_json_lines
from uvim_fsq.training import loop
from uvim_fsq.training.lock import run_lock
from uvim_fsq.training.progress import Progress
from uvim_fsq.training.run import train
from uvim_fsq.training.signals import Interrupted
from uvim_fsq.training.stages import OracleStage, build_stage
from uvim_fsq.training.trainer import Trainer

# --- which checkpoint is the result -----------------------------------------------------------------------------


def test_the_best_is_never_chosen_by_what_is_reported(tmp_path: Path, data: Path, quick_evaluation: None) -> None:
    watched = fitted(oracle_run(tmp_path / "watched", data, *STEPS, "data.selection_split=train", "train.eval_limit=5"))
    values = {p.name: json.loads((p / ckpt.FIGURES).read_text()) for p in checkpoints(watched)}
    best = min(values, key=lambda name: values[name]["figures"]["rmse"])
    assert best != step_name(8)
    assert all((v["split"], v["images"], v["protocol"]) == ("train", 5, "nyu_depth/full") for v in values.values())
    loaded = load_checkpoint(watched)
    assert (loaded.checkpoint.name, loaded.chosen) == (best, "best rmse on train, 5 images")
    other = load_checkpoint(watched, ["data.eval_split=train"])
    assert (other.checkpoint.name, other.chosen) == (step_name(8), "last")
    given = load_checkpoint(at(watched, 8))
    assert (given.checkpoint.name, given.chosen) == (step_name(8), "given")
    for watch in ("", "val"):
        plain = fitted(oracle_run(tmp_path / f"plain{watch}", data, *STEPS, f"data.selection_split={watch}"))
        assert [p.name for p in checkpoints(plain)] == [step_name(8)]
        assert load_checkpoint(plain).chosen == "last"


def test_results_say_how_the_checkpoint_was_chosen(oracle_dir: Path) -> None:
    assert json.loads((oracle_dir / "evaluation.json").read_text())["chosen"] == "last"
    assert evaluate(oracle_dir, limit=2)["chosen"] == "last"
    assert evaluate(checkpoints(oracle_dir)[-1], limit=2)["chosen"] == "given"


def test_the_last_evaluation_is_over_as_many_images_as_the_others(tmp_path: Path, data: Path) -> None:
    keys = ["train.steps=4", "train.eval_every=2", "train.eval_limit=3", "train.log_every=9"]
    lines = read_json_lines(fitted(oracle_run(tmp_path / "run", data, *keys)) / "metrics.jsonl")
    assert [line["eval/images"] for line in lines if "eval/images" in line] == [3, 3]
    keys = ["train.steps=3", "eval.limit=4", "data.selection_split=train"]
    run_dir = fitted(oracle_run(tmp_path / "limited", data, *keys))
    assert load_checkpoint(run_dir).chosen == "best rmse on train, 4 images"
    run_dir = fitted(oracle_run(tmp_path / "all", data, "train.steps=3", "data.selection_split=train", "eval.limit=99"))
    assert load_checkpoint(run_dir).chosen == "best rmse on train, 24 images"


# --- what must not be saved -------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", ["1.0", "null"])
def test_a_gradient_that_is_not_finite_is_never_saved(
    tmp_path: Path, data: Path, quick_evaluation: None, monkeypatch: pytest.MonkeyPatch, clip: str
) -> None:
    """With a finite loss: the error names the step (from the norm, else the save) and the real last good checkpoint."""
    out = tmp_path / "run"
    original = OracleStage.step
    count = 0

    def step(self: OracleStage, model: torch.nn.Module, batch: Any) -> Any:
        nonlocal count
        count += 1
        loss, logs = original(self, model, batch)
        if count == 4:
            loss.register_hook(lambda grad: grad * math.nan)
        return loss, logs

    monkeypatch.setattr(OracleStage, "step", step)
    keys = ["train.save_every=2", "train.keep=1", "train.log_every=100", f"optim.clip_norm={clip}"]
    wanted = "gradient's norm is not finite at step 4" if clip == "1.0" else "not finite after step 4"
    with pytest.raises(UserError, match=f"{wanted}; the last good checkpoint is {at(out, 2)}"):
        fitted(oracle_run(out, data, *keys))
    assert [p.name for p in checkpoints(out)] == [step_name(2)]
    assert all(bool(value.isfinite().all()) for value in weights(at(out, 2)).values())


@pytest.mark.parametrize("where", ["weights", "average", "optimizer", "buffer"])
def test_what_is_not_finite_anywhere_is_never_saved(tmp_path: Path, data: Path, where: str) -> None:
    keys = ["train.ema=0.9", "model.quantizer.kind=vq", "model.quantizer.codebook_size=16"]
    run = oracle_run(tmp_path / "run", data, *keys, "model.quantizer.codeword_dim=8")
    broken = Trainer(build_stage(run), run)
    broken.optimizer_step(broken.loader.batches(0, 1), lambda seconds: None)
    broken.save()
    assert broken.ema is not None
    first = next(iter(broken.stage.model.parameters()))
    places: dict[str, torch.Tensor] = {
        "weights": first.data,
        "average": next(iter(broken.ema.values())),
        "optimizer": broken.optimizer.state[first]["exp_avg_sq"],
        "buffer": next(x for x in broken.stage.model.buffers() if x.is_floating_point()),
    }
    places[where].view(-1)[-1] = math.inf
    broken.step += 1
    with pytest.raises(UserError, match=f"not finite after step 2; the last good checkpoint is {at(broken.out, 1)}"):
        broken.save()
    assert [p.name for p in checkpoints(broken.out)] == [step_name(1)]


def test_a_step_that_the_scaler_leaves_out_is_no_error(tmp_path: Path, data: Path) -> None:
    """With fp16 a gradient that is not finite is part of finding the scale; the loss must be finite with it too."""
    run = oracle_run(tmp_path / "run", data)
    trainer = Trainer(build_stage(run), run)
    trainer.out.mkdir()
    progress = Progress(run.train, "oracle", 6, 0, main=True)
    window = [{"loss": torch.tensor(1.0), "grad_norm": torch.tensor(math.inf)}, {"loss": torch.tensor(1.0)}]
    window[1]["grad_norm"] = torch.tensor(1.0)
    trainer.step = 4
    with pytest.raises(UserError, match="gradient's norm is not finite at step 3"):
        loop._log_window(trainer, progress, window)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    loop._log_window(trainer, progress, window)
    window[1]["loss"] = torch.tensor(math.nan)
    with pytest.raises(UserError, match="loss is not finite at step 4; no checkpoint was written yet"):
        loop._log_window(trainer, progress, window)
    progress.close()


def test_large_numbers_are_finite(tmp_path: Path, data: Path) -> None:
    """A sum of squares would not be."""
    run = oracle_run(tmp_path / "run", data)
    large = Trainer(build_stage(run), run)
    next(iter(large.stage.model.parameters())).data.fill_(1e30)
    large.step = 1
    large.save()
    assert [p.name for p in checkpoints(large.out)] == [step_name(1)]


# --- an LM and its oracle ---------------------------------------------------------------------------------------


@pytest.fixture
def lm_of_own_oracle(tmp_path: Path, data: Path, oracle_dir: Path) -> tuple[Path, Path]:
    """A half-trained LM, and its oracle's run, in which another checkpoint has become the best since."""
    oracle, out = tmp_path / "oracle", tmp_path / "lm"
    shutil.copytree(oracle_dir, oracle)
    train(lm_run(out, oracle, "train.save_every=3", "train.keep=9"))
    shutil.rmtree(at(out, 6))
    (out / "evaluation.json").unlink()
    newer = at(oracle, 7)
    model = load_checkpoint(oracle).oracle
    moved = {name: value + 0.3 for name, value in model.state_dict().items()}
    config = (at(oracle, 6) / "config.yaml").read_text()
    ckpt.save_checkpoint(oracle, 7, config=config, weights=moved, state={"step": 7})
    assert load_checkpoint(oracle).checkpoint == newer
    return out, oracle


def test_an_lm_keeps_its_oracle_when_resumed(tmp_path: Path, lm_dir: Path, lm_of_own_oracle: tuple[Path, Path]) -> None:
    out, oracle = lm_of_own_oracle
    wanted = recorded_hashes(at(out, 3))["oracle"]
    assert wanted == file_hash(at(oracle, 6) / ckpt.WEIGHTS) == file_hash(out / "oracle" / ckpt.WEIGHTS)
    train(lm_run(out, oracle, "train.resume=auto"))
    assert file_hash(out / "oracle" / ckpt.WEIGHTS) == wanted == recorded_hashes(at(out, 6))["oracle"]
    one, two = weights(at(out, 6)), weights(at(lm_dir, 6))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert outcome(out)["result"] == outcome(lm_dir)["result"]


def test_an_lm_that_goes_on_takes_no_other_oracle(
    tmp_path: Path, data: Path, lm_of_own_oracle: tuple[Path, Path]
) -> None:
    out, oracle = lm_of_own_oracle
    other = fitted(oracle_run(tmp_path / "other", data, "train.seed=1", "train.steps=3"))
    before = (out / "config.yaml").read_bytes()
    with pytest.raises(UserError, match=f"oracle={other}: .* a different one; leave oracle={oracle} as it was"):
        fitted(lm_run(out, other, "train.resume=auto"))
    assert (out / "config.yaml").read_bytes() == before
    # The same one under another name, and a name that leads nowhere.
    for name in (shutil.copytree(oracle, tmp_path / "moved"), tmp_path / "gone"):
        assert lm_run(out, name, "train.resume=auto").task.name == "nyu_depth"


def test_a_new_lm_takes_the_oracle_that_is_named(tmp_path: Path, lm_of_own_oracle: tuple[Path, Path]) -> None:
    _, oracle = lm_of_own_oracle
    out = fitted(lm_run(tmp_path / "new", oracle, "train.resume=auto", "train.steps=3"))
    assert recorded_hashes(at(out, 3))["oracle"] == file_hash(at(oracle, 7) / ckpt.WEIGHTS)


def test_an_oracle_that_is_gone_or_another(tmp_path: Path, lm_of_own_oracle: tuple[Path, Path]) -> None:
    out, oracle = lm_of_own_oracle
    copy = out / "oracle"
    shutil.rmtree(copy)
    # The checkpoint that it was copied from is still there.
    assert torch.equal(
        load_checkpoint(out).oracle.state_dict()["encoder_head.weight"], weights(at(oracle, 6))["encoder_head.weight"]
    )
    fitted(lm_run(out, oracle, "train.resume=auto"))
    assert file_hash(copy / ckpt.WEIGHTS) == file_hash(at(oracle, 6) / ckpt.WEIGHTS)
    ckpt.copy_checkpoint(at(oracle, 7), copy)
    for use in (lambda: load_checkpoint(out), lambda: lm_run(out, oracle, "train.resume=auto")):
        with pytest.raises(UserError, match="lm/oracle is not the oracle that .* was trained on"):
            use()
    shutil.rmtree(copy)
    shutil.rmtree(at(oracle, 6))
    for use in (lambda: load_checkpoint(out), lambda: lm_run(out, oracle, "train.resume=auto")):
        with pytest.raises(UserError, match="lm/oracle is missing, .*; copy the LM's whole run directory"):
            use()


def test_a_damaged_oracle_is_named(lm_of_own_oracle: tuple[Path, Path]) -> None:
    out, _ = lm_of_own_oracle
    file = out / "oracle" / ckpt.WEIGHTS
    content = bytearray(file.read_bytes())
    content[-7] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="lm/oracle/model.safetensors is damaged"):
        load_checkpoint(out)


# --- two trainings ----------------------------------------------------------------------------------------------


def test_two_trainings_in_one_directory(tmp_path: Path, data: Path, quick_evaluation: None) -> None:
    out = tmp_path / "run"
    run = oracle_run(out, data, "train.steps=3")
    with another_process(out) as process:
        with pytest.raises(UserError, match=f"being trained by process {process.pid} on .*choose another train.out"):
            fitted(run)
        assert not (out / "checkpoints").exists() and not (out / "metrics.jsonl").exists()
        process.kill()
        process.wait()
        fitted(run)
    assert checkpoints(out)
    with another_process(out):
        pass


def test_a_lock_holds_to_the_end_and_no_longer(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when training fails, and a loader process that outlives it does not hold it."""
    held: list[bool] = []
    ready, go_on = os.pipe()

    def training(*_: Any) -> None:
        if os.fork() == 0:
            os.close(go_on)
            os.read(ready, 1)  # until the test ends
            os._exit(0)
        pid = os.fork()
        if pid == 0:
            code = 1
            with contextlib.suppress(OSError):
                fcntl.lockf(os.open(tmp_path / "run" / ".lock", os.O_RDWR), fcntl.LOCK_EX | fcntl.LOCK_NB)
                code = 0
            os._exit(code)
        held.append(os.waitpid(pid, 0)[1] != 0)
        raise Interrupted(130)

    monkeypatch.setattr(loop, "_train", training)
    with pytest.raises(Interrupted):
        fitted(oracle_run(tmp_path / "run", data))
    assert held == [True]
    with another_process(tmp_path / "run"):
        os.close(go_on)
        os.wait()


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", none)
    with pytest.warns(UserWarning, match="without locks"), run_lock(tmp_path / "run"):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write .*file"), run_lock(tmp_path / "file"):
        pass


# --- damaged logs -----------------------------------------------------------------------------------------------


def test_damaged_log_lines(tmp_path: Path, data: Path, quick_evaluation: None) -> None:
    out = fitted(oracle_run(tmp_path / "run", data, "train.steps=3"))
    file = out / "metrics.jsonl"
    good = file.read_bytes()
    count = len(good.splitlines())
    file.write_bytes(good + b'{"step": 1, "loss": \xff}\n[1]\n{"step": "1"}\n' + b"[" * 100_000 + b'\n{"step": 2, "lo')
    with pytest.warns(UserWarning, match=f"metrics.jsonl: 3 damaged line.s. left out, the first is {count + 1}"):
        lines = read_json_lines(file)
    assert len(lines) == count + 1
    with pytest.warns(UserWarning, match="damaged line"):
        fitted(oracle_run(out, data, "train.steps=4", "train.resume=auto", *CHANGED))
    again = read_json_lines(file)
    assert again[:count] == lines[:count] and {line["step"] for line in again[count:]} == {4}
    file.unlink()
    assert read_json_lines(file) == []
    file.mkdir()
    with pytest.raises(UserError, match="metrics.jsonl cannot be read"):
        read_json_lines(file)
