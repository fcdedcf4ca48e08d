"""What one optimizer step does, and which steps are logged, saved and evaluated."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

from tests.support.small import lm_run, oracle_run
from uvim_fsq import processes
from uvim_fsq.checkpoints import files as ckpt
from uvim_fsq.config.parse import dump_yaml
from uvim_fsq.config.schema import Run
from uvim_fsq.data.loader import derive_seed
from uvim_fsq.errors import UserError
from uvim_fsq.oracle.model import Oracle
from uvim_fsq.oracle.quantizers.vq import VQ
from uvim_fsq.training import loop
from uvim_fsq.training.loop import fit
from uvim_fsq.training.optim import learning_rate
from uvim_fsq.training.progress import Progress
from uvim_fsq.training.signals import Interrupted
from uvim_fsq.training.stages import OracleStage, build_stage
from uvim_fsq.training.trainer import Trainer

VQ_KEYS = ("model.quantizer.kind=vq", "model.quantizer.codebook_size=16", "model.quantizer.codeword_dim=8")


def run_fit(run: Run) -> Path:
    return fit(build_stage(run), run)


def lines(run_dir: Path, key: str = "loss") -> list[dict[str, float]]:
    every = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    speeds = {"images_per_second", "mfu", "data_wait"}
    return [{k: v for k, v in line.items() if k not in speeds} for line in every if key in line]


def trainer_of(run: Run) -> Trainer:
    return Trainer(build_stage(run), run)


# ---------------------------------------------------------------- a step


@pytest.mark.parametrize("kind", ["fsq", "vq", "lm"])
def test_accumulation_equals_one_batch(tmp_path: Path, data: Path, oracle_dir: Path, kind: str) -> None:
    """Also where micro batches differ: 8 images as 3 + 3 + 2."""
    steps = []
    for count in (1, 2, 3):
        keys = [f"train.accumulate={count}", "train.steps=2", "optim.warmup_steps=0"]
        if kind == "lm":
            run = lm_run(tmp_path / str(count), oracle_dir, *keys)
        else:
            extra = VQ_KEYS if kind == "vq" else ()
            run = oracle_run(tmp_path / str(count), data, "model.code_dropout=none", *keys, *extra)
        trainer = trainer_of(run)
        batches = trainer.loader.batches(0, 2)
        logs = [trainer.stepper.optimizer_step(batches, lambda _: None) for _ in range(2)]
        assert trainer.step == 2 and next(batches, None) is None, "a step takes exactly its micro batches"
        steps.append(([{k: v.item() for k, v in log.items()} for log in logs], trainer.stage.model.state_dict()))
    for logs, weights in steps[1:]:
        for ours, theirs in zip(logs, steps[0][0], strict=True):
            assert ours == pytest.approx(theirs, abs=2e-5) and ours["grad_norm"] > 0.01
        assert all(torch.allclose(weights[name], value, atol=1e-4) for name, value in steps[0][1].items())


def test_a_step_is_what_it_says(tmp_path: Path, data: Path) -> None:
    """Against plain PyTorch: the gradient of the mean loss, clipped, and the update of AdamW."""
    keys = ["model.code_dropout=none", "optim.clip_norm=0.01", "optim.weight_decay=0", "optim.warmup_steps=0"]
    run = oracle_run(tmp_path / "run", data, *keys)
    trainer = trainer_of(run)
    stage = build_stage(run)
    assert isinstance(stage.model, Oracle)
    batch = next(trainer.loader.batches(0, 1))
    optimizer = torch.optim.AdamW(stage.model.parameters(), lr=run.optim.lr, betas=run.optim.betas, weight_decay=0)
    out = stage.model(batch["labels"], batch["image"], stage.task.loss)
    out.loss.mean().backward()
    norm = torch.nn.utils.clip_grad_norm_(stage.model.parameters(), 0.01)
    optimizer.step()

    logs = trainer.optimizer_step(iter([batch]), lambda _: None)
    assert logs["loss"].item() == pytest.approx(out.loss.mean().item()) and norm.item() > 0.02
    assert logs["grad_norm"].item() == pytest.approx(norm.item(), rel=1e-5)
    assert logs["bin_accuracy"].item() == pytest.approx(out.logs["bin_accuracy"].mean().item())
    ours, theirs = trainer.stage.model.state_dict(), stage.model.state_dict()
    assert all(torch.allclose(ours[name], value, atol=1e-7) for name, value in theirs.items())
    assert all(p.grad is None for p in trainer.stage.model.parameters()), "gradients of a step must not stay"


def test_each_step_has_its_rate(tmp_path: Path, data: Path) -> None:
    run = oracle_run(tmp_path / "run", data, "train.steps=5", "optim.warmup_steps=2")
    trainer = trainer_of(run)
    batches = trainer.loader.batches(0, 5)
    for step in range(5):
        trainer.stepper.optimizer_step(batches, lambda _: None)
        rates = {group["lr"] / group["lr_ratio"] for group in trainer.stepper.optimizers["model"].param_groups}
        assert rates == {learning_rate(step, 5, run.optim)} and trainer.step == step + 1


def test_without_clipping_there_is_no_norm(tmp_path: Path, data: Path) -> None:
    trainer = trainer_of(oracle_run(tmp_path / "run", data, "optim.clip_norm=null"))
    logs = trainer.optimizer_step(trainer.loader.batches(0, 1), lambda _: None)
    assert sorted(logs) == ["bin_accuracy", "loss"] and not any(x.requires_grad for x in logs.values())


def test_each_micro_batch_has_random_numbers_of_its_own(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of seed, step, process and micro batch alone, whatever was drawn before; the dictionary's of seed and step."""
    drawn: list[float] = []
    seeds: list[int] = []
    plain = OracleStage.step

    def step(self, model, batch):
        drawn.append(torch.rand(()).item())
        return plain(self, model, batch)

    monkeypatch.setattr(OracleStage, "step", step)
    monkeypatch.setattr(OracleStage, "on_optimizer_step", lambda self, reduce, seed: seeds.append(seed))
    run = oracle_run(tmp_path / "run", data, "train.accumulate=2", "train.seed=5")
    trainer = trainer_of(run)
    batches = trainer.loader.batches(0, 3)
    for _ in range(3):
        torch.rand(7)
        trainer.stepper.optimizer_step(batches, lambda _: None)
    expected = []
    for number, micro in itertools.product(range(3), range(2)):
        torch.manual_seed(derive_seed(5, number, 0, micro))
        expected.append(torch.rand(()).item())
    assert drawn == expected and len(set(drawn)) == 6
    assert seeds == [derive_seed(5, number) for number in range(3)]


def test_the_dictionary_learns(tmp_path: Path, data: Path) -> None:
    trainer = trainer_of(oracle_run(tmp_path / "run", data, *VQ_KEYS))
    assert isinstance(trainer.stage.model, Oracle) and isinstance(trainer.stage.model.quantizer, VQ)
    quantizer = trainer.stage.model.quantizer
    before = quantizer.counts.sum().item()
    trainer.optimizer_step(trainer.loader.batches(0, 1), lambda _: None)
    # Counts of one fade by the momentum; 8 images of 4 tokens come in.
    assert quantizer.counts.sum().item() == pytest.approx(before * 0.995 + 8 * 4)


def test_averaged_weights(tmp_path: Path, data: Path) -> None:
    trainer = trainer_of(oracle_run(tmp_path / "run", data, "train.ema=0.75"))
    model = trainer.stage.model
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert trainer.ema is not None and all(torch.equal(trainer.ema[name], p) for name, p in average.items())
    batches = trainer.loader.batches(0, 3)
    for _ in range(3):
        trainer.stepper.optimizer_step(batches, lambda _: None)
        average = {name: 0.75 * average[name] + 0.25 * p.detach() for name, p in model.named_parameters()}
    assert all(torch.allclose(trainer.ema[name], p, atol=1e-6) for name, p in average.items())
    assert not any(p.requires_grad for p in trainer.ema.values())
    assert not any(torch.equal(p, average[name]) for name, p in model.named_parameters())
    assert trainer_of(oracle_run(tmp_path / "run", data)).ema is None


def test_a_step_trains_and_says_how_long_it_waited(tmp_path: Path, data: Path) -> None:
    trainer = trainer_of(oracle_run(tmp_path / "run", data, "train.accumulate=2"))
    trainer.stage.model.eval()
    batches = trainer.loader.batches(0, 1)
    waits: list[float] = []

    def late():
        for batch in batches:
            time.sleep(0.2)
            yield batch

    start = time.perf_counter()
    trainer.optimizer_step(late(), waits.append)
    assert trainer.stage.model.training
    assert len(waits) == 2 and min(waits) >= 0.2 and sum(waits) <= time.perf_counter() - start


@pytest.mark.parametrize(("precision", "kind"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_precision(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, precision: str, kind: torch.dtype
) -> None:
    """Also where the environment asks for another one, and for another accumulation."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "7")
    kinds: set[torch.dtype] = set()
    plain = F.linear

    def linear(x, weight, bias=None):
        y = plain(x, weight, bias)
        kinds.add(y.dtype)
        return y

    trainer = trainer_of(
        oracle_run(tmp_path / "run", data, f"train.precision={precision}", "train.accumulate=2", "optim.warmup_steps=0")
    )
    before = {name: p.detach().clone() for name, p in trainer.stage.model.named_parameters()}
    monkeypatch.setattr(F, "linear", linear)
    trainer.optimizer_step(trainer.loader.batches(0, 1), lambda _: None)
    assert kinds == {kind} and trainer.accelerator.gradient_accumulation_steps == 2
    assert any(not torch.equal(p, before[name]) for name, p in trainer.stage.model.named_parameters())


# ---------------------------------------------------------------- the loop


def test_which_steps_are_logged_saved_and_evaluated(tmp_path: Path, data: Path) -> None:
    keys = ["train.steps=9", "train.keep=99"]
    every = lines(run_fit(oracle_run(tmp_path / "every", data, *keys)))
    sparse = ["train.log_every=4", "train.save_every=2", "train.eval_every=3", "train.eval_limit=2"]
    out = run_fit(oracle_run(tmp_path / "sparse", data, *keys, *sparse))
    assert [p.name for p in ckpt.checkpoints(out)] == [ckpt.step_name(n) for n in (2, 3, 4, 6, 8, 9)]
    evaluated = lines(out, "eval/rmse")
    assert [(line["step"], line["eval/images"]) for line in evaluated] == [(3, 2), (6, 2), (9, 2)]
    logged = lines(out)
    assert [line["step"] for line in logged] == [2, 3, 4, 6, 8, 9], "each checkpoint is logged, too"
    assert [line["step"] for line in every] == list(range(1, 10))
    optim = oracle_run(tmp_path / "every", data, *keys).optim
    assert [line["lr"] for line in every] == [learning_rate(step, 9, optim) for step in range(9)]
    last = 0
    for line in logged:
        window = every[last : int(line["step"])]
        last = int(line["step"])
        for key in ("loss", "grad_norm", "bin_accuracy"):
            assert line[key] == pytest.approx(sum(one[key] for one in window) / len(window), rel=1e-4)
        assert line["lr"] == window[-1]["lr"]
    ckpt_weights = safetensors.torch.load_file(ckpt.checkpoints(tmp_path / "every")[-1] / ckpt.WEIGHTS)
    ours = safetensors.torch.load_file(ckpt.checkpoints(out)[-1] / ckpt.WEIGHTS)
    assert all(torch.equal(ours[name], value) for name, value in ckpt_weights.items())


def test_log_lines_alone(tmp_path: Path, data: Path) -> None:
    """Without save_every and eval_every only the end is saved and evaluated; steps are logged by log_every."""
    out = run_fit(oracle_run(tmp_path / "run", data, "train.log_every=2", "train.steps=5", "optim.clip_norm=null"))
    assert [line["step"] for line in lines(out)] == [2, 4, 5] and len(ckpt.checkpoints(out)) == 1
    assert [line["step"] for line in lines(out, "eval/rmse")] == [5]


def test_what_a_run_starts_with(
    tmp_path: Path, data: Path, oracle_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loop, "matrix_rate", lambda device, precision: {"fp32": 1e12}[precision])
    wide = ["model.width=64", "train.precision=bf16"]
    (tmp_path / "run" / "checkpoints" / ".tmp_step_00000007").mkdir(parents=True)
    run = lm_run(tmp_path / "run", oracle_dir, "train.steps=1", "train.accumulate=2", "optim.warmup_steps=0", *wide)
    stage = build_stage(run)
    parameters = sum(p.numel() for p in stage.model.parameters()) / 1e6
    closed: list[bool] = []
    close = Progress.close
    monkeypatch.setattr(Progress, "close", lambda self: closed.append(True) or close(self))
    stepped: list[int] = []
    monkeypatch.setattr(Progress, "stepped", lambda self, step: stepped.append(step))
    fit(stage, run)
    assert closed and stepped == [1]
    said = capsys.readouterr().out.splitlines()[0]
    assert re.match(rf"training on .*: {parameters:.2f} M parameters, 24 samples, batch 8 = 4 x 2 x 1 ", said)
    assert said.endswith(f"step 0 of 1, into {tmp_path / 'run'}")
    assert (tmp_path / "run" / "config.yaml").read_text() == dump_yaml(run)
    assert (tmp_path / "run" / "oracle" / ckpt.WEIGHTS).is_file()
    assert not list((tmp_path / "run" / "checkpoints").glob(".tmp*"))
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert line["images_per_second"] / line["mfu"] == pytest.approx(1e12 / stage.train_flops())


@pytest.mark.parametrize(
    ("what", "bad", "kept"),
    [
        ("loss", 2, "no checkpoint was written yet"),
        ("loss", 5, "step_00000003. "),
        ("gradient norm", 6, "step_00000003. "),
    ],
)
def test_the_step_that_went_wrong_is_named(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, what: str, bad: int, kept: str
) -> None:
    plain = OracleStage.step
    count = itertools.count(1)

    def step(self, model, batch):
        loss, logs = plain(self, model, batch)
        if next(count) == bad:
            # Of a root at 0 the value is finite and the slope is not.
            loss = loss * float("nan") if what == "loss" else loss + (loss * 0).sqrt()
        return loss, logs

    monkeypatch.setattr(OracleStage, "step", step)
    with pytest.raises(UserError, match=f"the {what} is not finite at step {bad};.*{kept}"):
        run_fit(oracle_run(tmp_path / "run", data, "train.log_every=6", "train.save_every=3"))


def test_bad_samples_of_all_processes_are_logged(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Trainer.__init__

    def start(self, stage, run):
        plain(self, stage, run)
        self.loader.bad, self.loader.news = {3: "mine"}, True

    monkeypatch.setattr(Trainer, "__init__", start)
    others = [{4: "theirs", 3: "mine"}, {9: "third"}]
    monkeypatch.setattr(processes, "gather", lambda value: [value, *(others if isinstance(value, dict) else ())])
    # Not in evaluation, which is not about this.
    monkeypatch.setattr(Trainer, "evaluate", lambda *_, **__: None)
    out = run_fit(oracle_run(tmp_path / "run", data, "data.max_bad_samples=3"))
    assert [line["bad_samples"] for line in lines(out)] == [3.0] * 6
    with pytest.raises(UserError, match="3 unreadable training samples"):
        run_fit(oracle_run(tmp_path / "strict", data, "data.max_bad_samples=2"))


@pytest.mark.parametrize("other", [False, True], ids=["here", "in another process"])
def test_a_signal_ends_after_the_step(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], other: bool
) -> None:
    plain = OracleStage.step
    count = itertools.count(1)

    def step(self, model, batch):
        if next(count) == 3 and not other:
            os.kill(os.getpid(), signal.SIGINT)
        return plain(self, model, batch)

    monkeypatch.setattr(OracleStage, "step", step)
    if other:
        asked = itertools.count(1)
        monkeypatch.setattr(processes.Agreement, "ask", lambda *_: [next(asked) == 3, False])
    run = oracle_run(tmp_path / "run", data, "train.log_every=50", "train.save_every=1", "train.keep=1")
    with pytest.raises(Interrupted) as caught:
        run_fit(run)
    assert caught.value.code == (143 if other else 130)
    said = capsys.readouterr().out
    assert f"stopped by signal {15 if other else 2} after step 3; saved. Continue" in said and "evaluation" not in said
    assert [p.name for p in ckpt.checkpoints(tmp_path / "run")] == [ckpt.step_name(3)]
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2, 3]
    monkeypatch.undo()
    again = run_fit(replace(run, train=replace(run.train, resume="auto")))
    assert "step 3 of 6" in capsys.readouterr().out
    assert [line["step"] for line in lines(again)] == [1, 2, 3, 4, 5, 6]
    assert [p.name for p in ckpt.checkpoints(again)][-1] == ckpt.step_name(6)
