"""Training: resume bit for bit, real kills, golden loss curves, and what goes wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml

from tests.support.small import ORACLE, lm_run, oracle_run
from uvim_fsq.checkpoints import files as ckpt
from uvim_fsq.checkpoints.loading import build_task
from uvim_fsq.data.loader import TrainLoader, TrainPlan, rank_slice
from uvim_fsq.errors import UserError
from uvim_fsq.training.loop import fit
from uvim_fsq.training.stages import build_stage

CURVES = Path(__file__).parent / "loss_curves.json"


def losses(run_dir: Path) -> list[float]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(ckpt.checkpoints(run_dir)[-1] / ckpt.WEIGHTS)


def run_fit(run):
    return fit(build_stage(run), run)


def command(config: dict, folder: Path, *overrides: str) -> list[str]:
    file = folder / f"{config['stage']}.yaml"
    file.write_text(yaml.safe_dump(config))
    return ["-m", "uvim_fsq", "train-oracle" if config["stage"] == "oracle" else "train-lm", str(file), *overrides]


ENV = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}


@pytest.mark.parametrize("stage", ["oracle", "lm"])
def test_log_lines_say_how_fast(stage: str, oracle_dir: Path, lm_dir: Path) -> None:
    run_dir = oracle_dir if stage == "oracle" else lm_dir
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    stepped = [line for line in lines if "loss" in line]
    assert stepped
    for line in stepped:
        assert line["images_per_second"] > 0 and 0 < line["mfu"] < 1 and 0 <= line["data_wait"] <= 1
    ceilings = [line["images_per_second"] / line["mfu"] for line in stepped]
    assert max(ceilings) == pytest.approx(min(ceilings))


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
@pytest.mark.parametrize("stage", ["oracle", "lm"])
def test_resume_equals_one_go(tmp_path: Path, data: Path, oracle_dir: Path, stage: str, optimizer: str) -> None:
    """2N steps = N, stop, resume, N; over an epoch's end, with augmentation, dropout and EMA."""
    extra = ["train.ema=0.9", "train.save_every=3", "train.accumulate=2", f"optim.name={optimizer}"]
    extra += ["model.width=32", "model.mlp_dim=64"]  # adafactor factors nothing that is smaller

    def make(out: Path, *overrides: str):
        if stage == "oracle":
            return oracle_run(out, data, *extra, *overrides)
        return lm_run(out, oracle_dir, "model.dropout=0.1", *extra, *overrides)

    whole = run_fit(make(tmp_path / "whole"))
    halves = run_fit(make(tmp_path / "halves"))
    for late in ckpt.checkpoints(halves)[1:]:
        os.rename(late, tmp_path / f"gone_{late.name}")
    halves = run_fit(make(tmp_path / "halves", "train.resume=auto"))
    assert losses(whole) == losses(halves) and len(losses(whole)) == 6
    one, two = weights(whole), weights(halves)
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.slow
def test_sigkill_and_resume(tmp_path: Path, data: Path) -> None:
    overrides = [f"data.root={data}", "train.steps=40", "train.save_every=5", "train.keep=9"]
    whole = [sys.executable, *command(ORACLE, tmp_path, *overrides, f"train.out={tmp_path / 'whole'}")]
    subprocess.run(whole, env=ENV, check=True, capture_output=True)
    out = tmp_path / "killed"
    killed = [sys.executable, *command(ORACLE, tmp_path, *overrides, f"train.out={out}", "train.resume=auto")]
    process = subprocess.Popen(killed, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.time() + 600
    while not ckpt.checkpoints(out) and time.time() < deadline and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert ckpt.checkpoints(out) and len(ckpt.checkpoints(out)) < 8, "the kill came too late to test anything"
    subprocess.run(killed, env=ENV, check=True, capture_output=True)
    assert losses(tmp_path / "whole") == losses(out)
    one, two = weights(tmp_path / "whole"), weights(out)
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("stage", ["oracle", "lm"])
def test_loss_curve_has_not_moved(tmp_path: Path, data: Path, oracle_dir: Path, stage: str) -> None:
    """Twenty steps against recorded losses. UVIM_FSQ_RECORD=1 writes them anew, after a change that is meant."""
    if stage == "oracle":
        run = oracle_run(tmp_path / "run", data, "train.steps=20")
    else:
        run = lm_run(tmp_path / "run", oracle_dir, "train.steps=20")
    curve = losses(run_fit(run))
    recorded = json.loads(CURVES.read_text()) if CURVES.exists() else {}
    if os.environ.get("UVIM_FSQ_RECORD"):
        CURVES.write_text(json.dumps({**recorded, stage: [round(x, 5) for x in curve]}, indent=1) + "\n")
        return
    np.testing.assert_allclose(curve, recorded[stage], atol=5e-3)
    assert curve[-1] < curve[0]


def test_workers_do_not_change_the_data(data: Path) -> None:
    run = oracle_run(Path("x"), data)
    task = build_task(run)
    batches = []
    for workers in (0, 2):
        config = replace(run.data, workers=workers)
        loader = TrainLoader(task.source(str(data), "train"), task, config, batch_size=8, seed=3)
        batches.append(list(loader.batches(2, 5)))
    assert len(batches[0]) == 3
    for one, two in zip(*batches, strict=True):
        assert one["id"] == two["id"] and torch.equal(one["image"], two["image"])
        assert torch.equal(one["labels"]["depth"], two["labels"]["depth"])


def test_plan_visits_every_sample_once_per_epoch() -> None:
    plan = TrainPlan(20, 5, seed=1)
    epochs = [[r.index for step in range(4 * e, 4 * e + 4) for r in plan.step(step)] for e in range(3)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs) and epochs[0] != epochs[1]
    requests = plan.step(2)
    parts = [rank_slice(requests, micro, 2, rank, 2) for micro in range(2) for rank in range(2)]
    assert [r for part in parts for r in part] == requests


def test_bad_samples_are_skipped_and_counted(tmp_path: Path, data: Path) -> None:
    import shutil

    broken = tmp_path / "data"
    shutil.copytree(data, broken)
    victim = sorted(broken.rglob("train/**/*.h5"))[0]
    victim.write_bytes(victim.read_bytes()[:300])
    with pytest.raises(UserError, match=f"{victim.name}.*max_bad_samples=0"):
        run_fit(oracle_run(tmp_path / "strict", broken))
    run_fit(oracle_run(tmp_path / "lenient", broken, "data.max_bad_samples=9"))
    last = json.loads((tmp_path / "lenient" / "metrics.jsonl").read_text().splitlines()[-2])
    assert last["bad_samples"] >= 1


def test_what_goes_wrong(tmp_path: Path, data: Path, oracle_dir: Path, lm_dir: Path) -> None:
    with pytest.raises(UserError, match="exceeds the 24 training samples"):
        run_fit(oracle_run(tmp_path / "a", data, "train.batch_size=64"))
    with pytest.raises(UserError, match="not finite at step [1-6];"):
        run_fit(oracle_run(tmp_path / "b", data, "optim.lr=1e30", "optim.clip_norm=null", "train.log_every=6"))
    with pytest.raises(UserError, match="train.resume=auto"):
        run_fit(oracle_run(oracle_dir, data))
    with pytest.raises(UserError, match="no such run"):
        run_fit(oracle_run(tmp_path / "c", data, f"train.resume={tmp_path / 'nowhere'}"))
    with pytest.raises(UserError, match="not an oracle"):
        lm_run(tmp_path / "d", lm_dir)
    with pytest.raises(UserError, match="contains no checkpoint"):
        lm_run(tmp_path / "d", tmp_path)
    with pytest.raises(UserError, match="was trained at 16"):
        lm_run(tmp_path / "d", oracle_dir, "data.image_size=32")
    with pytest.raises(UserError, match="task.num_bins=8 but the oracle"):
        lm_run(tmp_path / "d", oracle_dir, "task.num_bins=8")
    assert lm_run(tmp_path / "d", oracle_dir, "task.decoding=expectation").task.options.decoding == "expectation"


@pytest.mark.parametrize("name", ["adafactor", "adamw"])
def test_both_optimizers_train(tmp_path: Path, data: Path, name: str) -> None:
    """In bf16; tests/test_compile.py trains compiled."""
    curve = losses(run_fit(oracle_run(tmp_path / name, data, f"optim.name={name}", "train.precision=bf16")))
    assert np.isfinite(curve).all() and curve[-1] < curve[0]
