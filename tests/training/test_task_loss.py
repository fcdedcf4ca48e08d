"""`loss.task_weight`: the task's loss of soft codes, through the frozen oracle's decoder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch._dynamo

from tests.support.runs import losses
from tests.support.small import TASKS, lm_run, random_batch
from uvim_fsq.config.schema import LMRun, OracleModelConfig, QuantizerConfig
from uvim_fsq.data.sample import Batch
from uvim_fsq.errors import UserError
from uvim_fsq.lm.autoregressive import AutoregressiveLM
from uvim_fsq.oracle import chunking
from uvim_fsq.oracle.model import Oracle
from uvim_fsq.tasks.base import Task
from uvim_fsq.training.loop import fit
from uvim_fsq.training.stages import LMStage

CONFIG = OracleModelConfig(4, 16, 1, 1, 2, 32, code_length=4, quantizer=QuantizerConfig(levels=(5, 5)))


def frozen_oracle(task: Task) -> Oracle:
    torch.manual_seed(0)
    oracle = Oracle(CONFIG, task.label_channels, 16)
    with torch.no_grad():
        for head in oracle.label_head.heads.children():
            head.get_parameter("weight").normal_(std=0.3)
    return oracle.eval().requires_grad_(False)


def stage(out: Path, oracle_dir: Path, task: str, *settings: str) -> tuple[LMStage, Batch]:
    """A stage on an untrained oracle of `task`, and a random batch."""
    run = lm_run(out, oracle_dir, *settings)
    assert isinstance(run, LMRun)
    oracle = frozen_oracle(TASKS[task])
    labels, image = random_batch(TASKS[task], 6)
    batch = {"labels": labels, "image": image, "index": torch.arange(6)}
    return LMStage(run, (oracle, TASKS[task])), batch


@pytest.mark.parametrize("task", TASKS)
def test_the_loss_is_that_of_the_tokens_plus_the_weighted_task_loss(
    tmp_path: Path, oracle_dir: Path, task: str
) -> None:
    plain, batch = stage(tmp_path / "a", oracle_dir, task)
    weighted, _ = stage(tmp_path / "b", oracle_dir, task, "loss.task_weight=0.7")
    token_loss, _ = plain.step(plain.model, batch)
    loss, logs = weighted.step(weighted.model, batch)
    oracle, lm = weighted.oracle, weighted.lm
    tokens = oracle.tokenize(batch["labels"], batch["image"])
    # The untrained head predicts all codes equally often.
    codes = oracle.quantizer.codebook().mean(0).expand(*tokens.shape, -1)
    logits = {name: x.flatten(1, 2) for name, x in oracle.decode(codes, batch["image"]).items()}
    expected, _ = TASKS[task].loss(logits, {name: x.flatten(1, 2) for name, x in batch["labels"].items()})
    assert float(lm.get_parameter("head.weight").detach().abs().max()) == 0
    torch.testing.assert_close(logs["token_loss"], token_loss)
    torch.testing.assert_close(logs["task_loss"], expected.mean())
    torch.testing.assert_close(loss, token_loss + 0.7 * expected.mean())


def test_the_gradient_reaches_the_token_model_and_not_the_oracle(tmp_path: Path, oracle_dir: Path) -> None:
    weighted, batch = stage(tmp_path, oracle_dir, "depth", "loss.task_weight=1")
    # Without the loss on tokens, all gradients come through the decoder.
    codes = weighted.code_loss(batch)
    assert codes is not None
    logits = weighted.lm.logits(batch["image"], weighted.oracle.tokenize(batch["labels"], batch["image"]))
    value, _ = codes(logits.softmax(-1), None)
    value.sum().backward()
    assert float(weighted.lm.get_parameter("head.weight").grad.abs().max()) > 0
    assert all(p.grad is None for p in weighted.oracle.parameters())


def test_certain_predictions_cost_what_the_oracle_s_own_codes_cost() -> None:
    task = TASKS["panoptic"]
    oracle = frozen_oracle(task)
    labels, image = random_batch(task, 3)
    tokens = oracle.tokenize(labels, image)
    certain = torch.nn.functional.one_hot(tokens, oracle.quantizer.codebook_size).float()
    soft, _ = oracle.label_loss(oracle.quantizer.expected_codes(certain), labels, image, task.loss)
    torch.testing.assert_close(soft, oracle(labels, image, task.loss).loss)


def test_chunks_change_neither_the_loss_nor_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    task = TASKS["depth"]
    oracle = frozen_oracle(task)
    labels, image = random_batch(task, 3)
    found = []
    for limit in (2**30, 700):
        monkeypatch.setattr(chunking, "MAX_LOGITS", limit)
        codes = torch.linspace(-1, 1, 24).view(3, 4, 2).requires_grad_()
        loss, _ = oracle.label_loss(codes, labels, image, task.loss)
        loss.sum().backward()
        found.append((loss.detach(), codes.grad))
    torch.testing.assert_close(found[0], found[1])


def test_the_soft_codes_stay_in_float32_under_autocast(tmp_path: Path, oracle_dir: Path) -> None:
    weighted, batch = stage(tmp_path, oracle_dir, "depth", "loss.task_weight=1")
    full, _ = weighted.step(weighted.model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        low, _ = weighted.step(weighted.model, batch)
        probabilities = torch.softmax(torch.randn(2, 4, 25), -1)
        codes = weighted.oracle.quantizer.expected_codes(probabilities)
    torch.testing.assert_close(low, full, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(codes, probabilities @ weighted.oracle.quantizer.codebook(), rtol=1e-6, atol=1e-6)


def test_a_token_model_that_ignores_the_task_loss_is_refused(
    tmp_path: Path, oracle_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weighted, batch = stage(tmp_path / "a", oracle_dir, "depth", "loss.task_weight=0.5")
    plain, _ = stage(tmp_path / "b", oracle_dir, "depth")
    loss = AutoregressiveLM.loss
    monkeypatch.setattr(AutoregressiveLM, "loss", lambda self, image, tokens, _=None: loss(self, image, tokens))
    with pytest.raises(UserError, match="loss.task_weight=0.5: .* AutoregressiveLM .* its `loss` ignores `code_loss`"):
        weighted.step(weighted.model, batch)
    assert "task_loss" not in plain.step(plain.model, batch)[1]


@pytest.mark.slow
def test_training_with_a_task_loss_resumes_exactly_and_leaves_the_oracle_as_it_is(
    tmp_path: Path, oracle_dir: Path
) -> None:
    settings = ("loss.task_weight=0.5", "train.save_every=3", "train.accumulate=2")
    run = lm_run(tmp_path / "whole", oracle_dir, *settings)
    assert isinstance(run, LMRun)
    before = LMStage(run).oracle.state_dict()
    trained = LMStage(run)
    fit(trained, run)
    torch.testing.assert_close(trained.oracle.state_dict(), before, rtol=0, atol=0)
    checkpoint = tmp_path / "whole" / "checkpoints" / "step_00000003"
    again = lm_run(tmp_path / "again", oracle_dir, *settings, f"train.resume={checkpoint}")
    assert isinstance(again, LMRun)
    fit(LMStage(again), again)
    assert losses(tmp_path / "again") == losses(tmp_path / "whole")[3:]
    # A run with another weight is another run.
    other = lm_run(tmp_path / "other", oracle_dir, "loss.task_weight=2", f"train.resume={checkpoint}")
    assert isinstance(other, LMRun)
    with pytest.raises(UserError, match="loss.task_weight"):
        fit(LMStage(other), other)


def test_a_negative_weight_is_refused(tmp_path: Path, oracle_dir: Path) -> None:
    with pytest.raises(UserError, match="loss.task_weight=-1.*must not be negative"):
        lm_run(tmp_path, oracle_dir, "loss.task_weight=-1")


@pytest.mark.slow
@torch._dynamo.config.patch(error_on_recompile=True)
def test_a_compiled_token_model_has_the_same_task_loss(tmp_path: Path, oracle_dir: Path) -> None:
    plain, batch = stage(tmp_path / "a", oracle_dir, "depth", "loss.task_weight=1")
    model = torch.compile(plain.model, dynamic=False, backend="aot_eager")
    for again in range(3):
        batch["image"] = batch["image"].roll(again)
        expected, _ = plain.step(plain.model, batch)
        expected.backward()
        gradients = [p.grad for p in plain.model.parameters()]
        plain.model.zero_grad()
        loss, _ = plain.step(model, batch)
        loss.backward()
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close([p.grad for p in plain.model.parameters()], gradients)
        plain.model.zero_grad()
