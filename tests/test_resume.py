"""How a run goes on: killed at any point, with other averages, from an older checkpoint, beside another training."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml

from tests.ranks import finish, run_ranks, start_ranks
from tests.small import LM, ORACLE, lm_run, oracle_run
from uvim_fsq.cli import main as cli
from uvim_fsq.config import Run, TrainConfig
from uvim_fsq.errors import UserError
from uvim_fsq.evaluation import evaluate_run
from uvim_fsq.files import read_json_lines
from uvim_fsq.models import load_checkpoint
from uvim_fsq.run_dirs import checkpoints, file_hash, recorded_hashes, step_name
from uvim_fsq.training import checkpoint as ckpt
from uvim_fsq.training import loop, trainer
from uvim_fsq.training.lock import run_lock
from uvim_fsq.training.loop import fit
from uvim_fsq.training.progress import Progress
from uvim_fsq.training.run import train
from uvim_fsq.training.signals import Interrupted
from uvim_fsq.training.stages import OracleStage, build_stage
from uvim_fsq.training.trainer import Trainer

#: Of log lines, what differs from run to run by its nature.
TIMED = ("images_per_second", "mfu", "data_wait")
#: A resumption with other settings has to be asked for.
CHANGED = ["train.resume_changes=true"] if hasattr(TrainConfig, "resume_changes") else []
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}


class Killed(BaseException):
    """Stands in for a kill: nothing catches it."""


def fitted(run: Run) -> Path:
    return fit(build_stage(run), run)


def outcome(run_dir: Path) -> dict[str, Any]:
    """All that a run leaves, without what differs by its nature."""
    lines = read_json_lines(run_dir / "metrics.jsonl")
    found: dict[str, Any] = {"metrics": [{k: v for k, v in line.items() if k not in TIMED} for line in lines]}
    for path in checkpoints(run_dir):
        found[path.name] = file_hash(path / ckpt.WEIGHTS)
        evaluation = path / ckpt.FIGURES
        found[f"{path.name} evaluated"] = json.loads(evaluation.read_text()) if evaluation.exists() else None
    found["panels"] = {p.name: p.read_bytes() for p in (run_dir / "panels").iterdir()}
    with contextlib.suppress(FileNotFoundError):
        found["result"] = json.loads((run_dir / "evaluation.json").read_text())["figures"]
    return found


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(checkpoint / ckpt.WEIGHTS)


def at(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / step_name(step)


@pytest.fixture
def quick_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures that jump up and down with the weights, and a picture of them, in no time."""

    def evaluate(
        self: OracleStage, model: torch.nn.Module, limit: int | None, device: torch.device
    ) -> dict[str, float]:
        return {"rmse": abs(math.sin(1e5 * sum(float(p.sum()) for p in model.parameters())))}

    def panel(self: OracleStage, model: torch.nn.Module, device: torch.device) -> np.ndarray:
        return np.full((4, 4, 3), int(255 * evaluate(self, model, None, device)["rmse"]), np.uint8)

    monkeypatch.setattr(OracleStage, "evaluate", evaluate)
    monkeypatch.setattr(OracleStage, "panel", panel)


# --- killed at any point ---------------------------------------------------------------------------------------

STEPS = ["train.steps=8", "train.eval_every=2", "train.save_every=1", "train.keep=1", "train.ema=0.5"]
POINTS: dict[str, tuple[Any, str, str]] = {
    "in the middle of a save": (torch, "save", "before"),
    "after a save": (Trainer, "evaluate", "before"),
    "after the evaluation": (trainer, "write_whole", "before"),
    "after the picture": (Progress, "evaluated", "before"),
    "after the log line": (ckpt, "write_evaluation", "before"),
    "after the mark": (ckpt, "write_evaluation", "after"),
    "in the middle of deleting": (shutil, "rmtree", "before"),
    "after deleting": (ckpt, "prune", "after"),
}


@contextlib.contextmanager
def killing(place: Any, name: str, when: str, countdown: int) -> Iterator[list[int]]:
    """Raises `Killed` before or after the call of `place.name` number `countdown`."""
    original: Callable[..., Any] = getattr(place, name)
    calls: list[int] = []

    def call(*arguments: Any, **named: Any) -> Any:
        # A folder that is not there is not deleted.
        if name != "rmtree" or arguments[0].exists():
            calls.append(1)
        if when == "before" and len(calls) == countdown:
            raise Killed
        result = original(*arguments, **named)
        if when == "after" and len(calls) == countdown:
            raise Killed
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place, name, call)
        yield calls


@pytest.mark.parametrize("point", POINTS)
def test_a_kill_at_any_point_loses_nothing(tmp_path: Path, data: Path, quick_evaluation: None, point: str) -> None:
    """Weights, log, pictures, evaluations and the best checkpoint are those of a run that nothing disturbed."""
    common = [*STEPS, "data.watch_split=train"]
    whole = outcome(fitted(oracle_run(tmp_path / "whole", data, *common)))
    best = load_checkpoint(tmp_path / "whole").checkpoint.name
    values = {k: v["figures"]["rmse"] for k, v in whole.items() if k.endswith("evaluated") and v}
    assert len(values) == 2 and best != step_name(8), "the best must not be the last, or this tests nothing"
    place, name, when = POINTS[point]
    for countdown in (1, 2, 3):
        out = tmp_path / f"killed{countdown}"
        run = oracle_run(out, data, *common, "train.resume=auto")
        with killing(place, name, when, countdown) as calls, pytest.raises(Killed):
            fitted(run)
        assert len(calls) == countdown
        assert outcome(fitted(run)) == whole
        assert load_checkpoint(out).checkpoint.name == best


def test_the_missing_evaluation_comes_before_any_step(
    tmp_path: Path, data: Path, quick_evaluation: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also at the end of training, and a checkpoint without it is not deleted."""
    out = tmp_path / "run"
    run = oracle_run(out, data, *STEPS, "train.resume=auto")
    with killing(Trainer, "evaluate", "before", 4), pytest.raises(Killed):
        fitted(run)
    assert at(out, 8).is_dir() and not (at(out, 8) / ckpt.FIGURES).exists()
    monkeypatch.setattr(Trainer, "optimizer_step", None)
    fitted(run)
    assert (at(out, 8) / ckpt.FIGURES).exists()
    evaluated = [line["step"] for line in read_json_lines(out / "metrics.jsonl") if "eval/rmse" in line]
    assert evaluated == [2, 4, 6, 8]
    monkeypatch.setattr(Trainer, "evaluate", None)
    fitted(run)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["oracle", "lm"])
def test_sigkill_in_an_evaluation(tmp_path: Path, data: Path, oracle_dir: Path, stage: str) -> None:
    """A process killed between save and evaluation, resumed, ends as one that was not killed."""
    config = {**(ORACLE if stage == "oracle" else LM), "stage": stage}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(config))
    keys = [f"data.root={data}" if stage == "oracle" else f"oracle={oracle_dir}", "data.watch_split=holdout"]
    keys += ["train.eval_every=2", "train.ema=0.9", "train.keep=1", "train.resume=auto"]
    base = [sys.executable, "-m", "uvim_fsq", f"train-{stage}", str(file), *keys]
    env = {**ENV, "PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run([*base, f"train.out={tmp_path / 'whole'}"], env=env, check=True, capture_output=True)
    out = tmp_path / "killed"
    process = subprocess.Popen([*base, f"train.out={out}"], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.time() + 600
    while not at(out, 4).is_dir() and process.poll() is None and time.time() < deadline:
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert at(out, 4).is_dir() and not (at(out, 4) / ckpt.FIGURES).exists(), "the kill came at the wrong time"
    subprocess.run([*base, f"train.out={out}"], env=env, check=True, capture_output=True)
    assert outcome(out) == outcome(tmp_path / "whole")


# --- which checkpoint is the result -----------------------------------------------------------------------------


def test_the_best_is_never_chosen_by_what_is_reported(tmp_path: Path, data: Path, quick_evaluation: None) -> None:
    watched = fitted(oracle_run(tmp_path / "watched", data, *STEPS, "data.watch_split=train", "train.eval_limit=5"))
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
        plain = fitted(oracle_run(tmp_path / f"plain{watch}", data, *STEPS, f"data.watch_split={watch}"))
        assert [p.name for p in checkpoints(plain)] == [step_name(8)]
        assert load_checkpoint(plain).chosen == "last"


def test_results_say_how_the_checkpoint_was_chosen(oracle_dir: Path) -> None:
    assert json.loads((oracle_dir / "evaluation.json").read_text())["chosen"] == "last"
    assert evaluate_run(oracle_dir, limit=2)["chosen"] == "last"
    assert evaluate_run(checkpoints(oracle_dir)[-1], limit=2)["chosen"] == "given"


def test_the_last_evaluation_is_over_as_many_images_as_the_others(tmp_path: Path, data: Path) -> None:
    keys = ["train.steps=4", "train.eval_every=2", "train.eval_limit=3", "train.log_every=9"]
    lines = read_json_lines(fitted(oracle_run(tmp_path / "run", data, *keys)) / "metrics.jsonl")
    assert [line["eval/images"] for line in lines if "eval/images" in line] == [3, 3]
    keys = ["train.steps=3", "eval.limit=4", "data.watch_split=train"]
    run_dir = fitted(oracle_run(tmp_path / "limited", data, *keys))
    assert load_checkpoint(run_dir).chosen == "best rmse on train, 4 images"
    run_dir = fitted(oracle_run(tmp_path / "all", data, "train.steps=3", "data.watch_split=train", "eval.limit=99"))
    assert load_checkpoint(run_dir).chosen == "best rmse on train, 24 images"


# --- averages ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", ["0.9", "null"])
@pytest.mark.parametrize("before", ["0.9", "null"])
def test_averages_switched_on_and_off_at_resume(
    tmp_path: Path, data: Path, quick_evaluation: None, before: str, after: str
) -> None:
    """An average begins with the loaded weights; without one, training goes on from the trained weights."""
    out = tmp_path / "run"
    fitted(oracle_run(out, data, "train.steps=6", "train.save_every=3", f"train.ema={before}", "train.keep=9"))
    shutil.rmtree(at(out, 6))
    state = torch.load(at(out, 3) / ckpt.STATE, weights_only=True)
    trained = state.get("raw", weights(at(out, 3)))
    run = oracle_run(out, data, "train.steps=6", f"train.ema={after}", "train.resume=auto", *CHANGED)
    resumed = Trainer(build_stage(run), run)
    resumed.resume()
    now = dict(resumed.stage.model.named_parameters())
    assert ("raw" in state) == (before != "null")
    assert all(torch.equal(now[name], trained[name]) for name in now)
    if after == "null":
        assert resumed.ema is None
    else:
        saved = weights(at(out, 3))
        assert resumed.ema is not None and all(torch.equal(resumed.ema[name], saved[name]) for name in now)
        assert all(resumed.ema[name].data_ptr() != now[name].data_ptr() for name in now)


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
        with pytest.raises(UserError, match="lm/oracle is missing, .*; copy the LM's run directory whole"):
            use()


def test_a_damaged_oracle_is_named(lm_of_own_oracle: tuple[Path, Path]) -> None:
    out, _ = lm_of_own_oracle
    file = out / "oracle" / ckpt.WEIGHTS
    content = bytearray(file.read_bytes())
    content[-7] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="lm/oracle/model.safetensors is damaged"):
        load_checkpoint(out)


# --- older, broken and foreign checkpoints ----------------------------------------------------------------------


def test_going_on_from_an_older_checkpoint(
    tmp_path: Path, data: Path, quick_evaluation: None, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    keys = ["train.steps=8", "train.save_every=2", "train.eval_every=2", "train.keep=9"]
    fitted(oracle_run(out, data, *keys))
    whole = outcome(out)
    (out / "evaluation.json").write_text("{}")
    run = oracle_run(out, data, *keys, f"train.resume={at(out, 4)}")
    with killing(Trainer, "optimizer_step", "before", 1), pytest.raises(Killed):
        fitted(run)
    assert "2 newer checkpoint(s) moved to" in capsys.readouterr().out
    assert [p.name for p in checkpoints(out)] == [step_name(2), step_name(4)]
    assert sorted(p.name for p in (out / ckpt.SET_ASIDE).iterdir()) == [step_name(6), step_name(8)]
    assert not (out / "evaluation.json").exists(), "a run that goes on has no result"
    assert {line["step"] for line in read_json_lines(out / "metrics.jsonl")} == {1, 2, 3, 4}
    assert outcome(fitted(oracle_run(out, data, *keys, "train.resume=auto"))) == whole
    (out / "evaluation.json").write_text("{}")
    fitted(oracle_run(out, data, *keys, "train.resume=auto"))
    assert (out / "evaluation.json").exists()


@pytest.mark.parametrize("name", ["trainer/state.pt", "model.safetensors"])
def test_a_broken_newest_checkpoint(tmp_path: Path, data: Path, quick_evaluation: None, name: str) -> None:
    out = tmp_path / "run"
    fitted(oracle_run(out, data, "train.steps=4", "train.save_every=2"))
    (at(out, 4) / name).write_bytes(b"")
    with pytest.raises(UserError, match=f"{name} is damaged.*the one before it: train.resume={at(out, 2)}$"):
        fitted(oracle_run(out, data, "train.steps=4", "train.resume=auto"))
    fitted(oracle_run(out, data, "train.steps=4", f"train.resume={at(out, 2)}"))
    shutil.rmtree(at(out, 2))
    (at(out, 4) / name).write_bytes(b"")
    with pytest.raises(UserError, match="damaged") as caught:
        fitted(oracle_run(out, data, "train.steps=4", "train.resume=auto"))
    assert "before it" not in str(caught.value)


# --- two trainings ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def another_process(run_dir: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds a run directory's lock until its input ends."""
    code = "import sys; from pathlib import Path; from uvim_fsq.training.lock import run_lock\n"
    code += "with run_lock(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    env = {**ENV, "PYTHONPATH": str(Path(__file__).parents[1])}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", code, str(run_dir)], env=env, **pipes)
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


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
    """Also when training fails, and children that outlive it do not hold it."""
    held: list[bool] = []

    def training(*_: Any) -> None:
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
        pass


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", none)
    with pytest.warns(UserWarning, match="without locks"), run_lock(tmp_path / "run"):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write .*file"), run_lock(tmp_path / "file"):
        pass


# --- several processes ------------------------------------------------------------------------------------------


def rank_in_own_folder(folder: str, data: str) -> None:
    """What a rank runs: training in a directory of its own under the same name, as on machines that share no disk."""
    os.chdir(Path(folder) / f"rank{os.environ['RANK']}")
    file = Path("run.yaml")
    file.write_text(yaml.safe_dump(ORACLE))
    keys = [f"data.root={data}", "train.out=run", "train.resume=auto"]
    cli(["train-oracle", str(file), *keys])


@pytest.mark.multi
@pytest.mark.slow
@pytest.mark.parametrize("case", ["missing", "another", "damaged"])
def test_ranks_resume_the_same_checkpoint_or_stop(tmp_path: Path, data: Path, oracle_dir: Path, case: str) -> None:
    out = [tmp_path / f"rank{rank}" / "run" for rank in (0, 1)]
    for place in out:
        shutil.copytree(oracle_dir, place)
    other = weights(at(out[1], 6))
    if case == "missing":
        shutil.rmtree(at(out[1], 6))
    elif case == "damaged":
        (at(out[1], 6) / ckpt.WEIGHTS).write_bytes(b"")
    else:
        config = (at(out[1], 6) / "config.yaml").read_text()
        state = torch.load(at(out[1], 6) / ckpt.STATE, weights_only=True)
        moved = {name: value + 1 for name, value in other.items()}
        ckpt.save_checkpoint(out[1], 6, config=config, weights=moved, state=state)
    process = start_ranks(2, "tests.test_resume:rank_in_own_folder", str(tmp_path), str(data))
    said = finish(process)
    wanted = {
        "missing": "error: process 1 has no run/checkpoints/step_00000006; the run directory must be one",
        "damaged": "error: run/checkpoints/step_00000006/model.safetensors is damaged",
        "another": "error: the processes loaded different checkpoints from run/checkpoints/step_00000006",
    }
    assert process.returncode != 0 and wanted[case] in said, said
    assert [p.name for p in checkpoints(out[0])] == [step_name(6)]


@pytest.mark.multi
@pytest.mark.slow
def test_two_ranks_save_resume_and_lock(tmp_path: Path, data: Path) -> None:
    """Only the first takes the lock, and all stop where another training holds it."""
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(ORACLE))
    keys = ["train-oracle", str(file), f"data.root={data}", "data.watch_split=holdout", "train.eval_every=2"]
    out = tmp_path / "run"
    with another_process(out):
        process = start_ranks(2, "cli", *keys, f"train.out={out}")
        said = finish(process)
        assert process.returncode != 0 and "is being trained by process" in said, said
    run_ranks(2, "cli", *keys, f"train.out={out}")
    for late in checkpoints(out)[1:]:
        shutil.rmtree(late)
    run_ranks(2, "cli", *keys, f"train.out={out}", "train.resume=auto")
    run_ranks(2, "cli", *keys, f"train.out={tmp_path / 'whole'}")
    assert outcome(out)["metrics"] == outcome(tmp_path / "whole")["metrics"]


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
