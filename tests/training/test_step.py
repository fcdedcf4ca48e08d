"""One optimizer step: accumulation, clipping, rates, random numbers, averages, precision."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.support.small import lm_run, oracle_run
from uvim_fsq.config.schema import Run
from uvim_fsq.data.loader import derive_seed
from uvim_fsq.oracle.model import Oracle
from uvim_fsq.oracle.quantizers.vq import VQ
from uvim_fsq.training.optim import learning_rate
from uvim_fsq.training.stages import OracleStage, build_stage
from uvim_fsq.training.trainer import Trainer

VQ_KEYS = ("model.quantizer.kind=vq", "model.quantizer.codebook_size=16", "model.quantizer.codeword_dim=8")


def trainer_of(run: Run) -> Trainer:
    return Trainer(build_stage(run), run)


@pytest.mark.slow
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


def test_a_step_equals_plain_pytorch(tmp_path: Path, data: Path) -> None:
    """The clipped gradient of the mean loss, and the update of AdamW."""
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

    logs = trainer.stepper.optimizer_step(iter([batch]), lambda _: None)
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
    logs = trainer.stepper.optimizer_step(trainer.loader.batches(0, 1), lambda _: None)
    assert sorted(logs) == ["bin_accuracy", "loss"] and not any(x.requires_grad for x in logs.values())


def test_random_numbers_depend_on_seed_step_process_and_micro_batch(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing that was drawn before matters; random numbers of the codebook depend on seed and step."""
    drawn: list[float] = []
    seeds: list[int] = []
    original = OracleStage.step

    def step(self, model, batch):
        drawn.append(torch.rand(()).item())
        return original(self, model, batch)

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


def test_a_step_updates_the_codebook(tmp_path: Path, data: Path) -> None:
    trainer = trainer_of(oracle_run(tmp_path / "run", data, *VQ_KEYS))
    assert isinstance(trainer.stage.model, Oracle) and isinstance(trainer.stage.model.quantizer, VQ)
    quantizer = trainer.stage.model.quantizer
    before = quantizer.counts.sum().item()
    trainer.stepper.optimizer_step(trainer.loader.batches(0, 1), lambda _: None)
    # Counts of one fade by the momentum; 8 images of 4 tokens come in.
    assert quantizer.counts.sum().item() == pytest.approx(before * 0.995 + 8 * 4)


def test_averaged_weights_follow_the_trained_ones(tmp_path: Path, data: Path) -> None:
    trainer = trainer_of(oracle_run(tmp_path / "run", data, "train.ema=0.75"))
    model = trainer.stage.model
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    ema = trainer.stepper.ema
    assert ema is not None and all(torch.equal(ema[name], p) for name, p in average.items())
    batches = trainer.loader.batches(0, 3)
    for _ in range(3):
        trainer.stepper.optimizer_step(batches, lambda _: None)
        average = {name: 0.75 * average[name] + 0.25 * p.detach() for name, p in model.named_parameters()}
    assert all(torch.allclose(ema[name], p, atol=1e-6) for name, p in average.items())
    assert not any(p.requires_grad for p in ema.values())
    assert not any(torch.equal(p, average[name]) for name, p in model.named_parameters())
    assert trainer_of(oracle_run(tmp_path / "run", data)).stepper.ema is None


def test_a_step_reports_how_long_it_waited_for_data(tmp_path: Path, data: Path) -> None:
    trainer = trainer_of(oracle_run(tmp_path / "run", data, "train.accumulate=2"))
    trainer.stage.model.eval()
    batches = trainer.loader.batches(0, 1)
    waits: list[float] = []

    def late():
        for batch in batches:
            time.sleep(0.2)
            yield batch

    start = time.perf_counter()
    trainer.stepper.optimizer_step(late(), waits.append)
    assert trainer.stage.model.training
    assert len(waits) == 2 and min(waits) >= 0.2 and sum(waits) <= time.perf_counter() - start


@pytest.mark.parametrize(("precision", "kind"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_the_configured_precision_wins_over_the_environment(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, precision: str, kind: torch.dtype
) -> None:
    """Also where the environment asks for another one, and for another accumulation."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "7")
    kinds: set[torch.dtype] = set()
    original = F.linear

    def linear(x, weight, bias=None):
        y = original(x, weight, bias)
        kinds.add(y.dtype)
        return y

    trainer = trainer_of(
        oracle_run(tmp_path / "run", data, f"train.precision={precision}", "train.accumulate=2", "optim.warmup_steps=0")
    )
    before = {name: p.detach().clone() for name, p in trainer.stage.model.named_parameters()}
    monkeypatch.setattr(F, "linear", linear)
    trainer.stepper.optimizer_step(trainer.loader.batches(0, 1), lambda _: None)
    assert kinds == {kind} and trainer.accelerator.gradient_accumulation_steps == 2
    assert any(not torch.equal(p, before[name]) for name, p in trainer.stage.model.named_parameters())
