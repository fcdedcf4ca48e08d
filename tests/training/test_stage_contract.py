"""What the training loop allows a stage and a task beyond what the two stages use today."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.support.small import TASKS, oracle_run
from uvim_fsq.config.schema import OracleRun
from uvim_fsq.data.sample import Batch
from uvim_fsq.errors import UserError
from uvim_fsq.files import read_json_lines
from uvim_fsq.oracle.label_head import LabelHead
from uvim_fsq.tasks.nyu_depth.task import NYUDepth
from uvim_fsq.training.loop import fit
from uvim_fsq.training.stages import MAIN, OracleStage
from uvim_fsq.training.step import Stepper


class AdversarialStage(OracleStage):
    """The oracle against a critic of its depth bins: two losses, two optimizers."""

    def __init__(self, run: OracleRun) -> None:
        super().__init__(run)
        self.auxiliary = {"critic": nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 1))}

    def build_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        groups = [{"params": list(self.auxiliary["critic"].parameters()), "lr_ratio": 2.0, "lr": 1e-3}]
        return {**super().build_optimizers(), "critic": torch.optim.SGD(groups)}

    def steps(
        self, model: nn.Module, auxiliary: Mapping[str, nn.Module], batch: Batch
    ) -> Iterator[tuple[str, torch.Tensor, dict[str, torch.Tensor]]]:
        loss, logs = self.step(model, batch)
        fake = self.oracle.detokenize(torch.zeros(len(batch["image"]), 4, dtype=torch.long), batch["image"])["depth"]
        yield MAIN, loss - self.auxiliary["critic"](fake.softmax(-1)).mean(), logs
        real = nn.functional.one_hot(batch["labels"]["depth"].long().clamp_min(0), 16).float()
        critic = auxiliary["critic"]
        value = critic(fake.detach().softmax(-1)).mean() - critic(real).mean()
        yield "critic", value, {"critic_gap": value.detach()}


@pytest.fixture
def run(tmp_path: Path, data: Path) -> OracleRun:
    run = oracle_run(tmp_path / "run", data, "train.save_every=3", "train.accumulate=2")
    assert isinstance(run, OracleRun)
    return run


def resumed(run: OracleRun, data: Path, out: Path) -> Path:
    checkpoint = Path(run.train.out) / "checkpoints" / "step_00000003"
    settings = ("train.save_every=3", "train.accumulate=2", f"train.resume={checkpoint}")
    again = oracle_run(out, data, *settings)
    assert isinstance(again, OracleRun)
    return fit(AdversarialStage(again), again)


def final_state(run_dir: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    import safetensors.torch

    checkpoint = run_dir / "checkpoints" / "step_00000006"
    state = torch.load(checkpoint / "trainer" / "state.pt", weights_only=True)
    return state, safetensors.torch.load_file(checkpoint / "model.safetensors")


@pytest.mark.slow
def test_two_optimizers_train_their_own_parameters_and_resume_exactly(
    run: OracleRun, data: Path, tmp_path: Path
) -> None:
    whole, weights = final_state(fit(AdversarialStage(run), run))
    again, weights_again = final_state(resumed(run, data, tmp_path / "again"))
    assert whole["optimizers"].keys() == {"model", "critic"}
    critic = whole["auxiliary"]["critic"]
    torch.manual_seed(run.train.seed)
    fresh = AdversarialStage(run).auxiliary["critic"].state_dict()
    assert all(not torch.equal(critic[name], fresh[name]) for name in critic if name.endswith("weight"))
    assert not any("critic" in name for name in weights), "it is no part of the result"
    for name, value in critic.items():
        assert torch.equal(value, again["auxiliary"]["critic"][name])
    assert all(torch.equal(weights[name], weights_again[name]) for name in weights)
    lines = [line for line in read_json_lines(Path(run.train.out) / "metrics.jsonl") if "loss" in line]
    assert all({"critic_loss", "critic_gap", "critic_grad_norm", "grad_norm"} <= line.keys() for line in lines)


def test_a_loss_changes_only_the_gradients_of_its_own_optimizer(run: OracleRun, data: Path) -> None:
    batch = Batch(
        image=torch.randint(256, (4, 3, 16, 16), dtype=torch.uint8),
        labels={"depth": torch.randint(16, (4, 16, 16), dtype=torch.uint8)},
        index=torch.arange(4),
        id=list("abcd"),
    )
    stage = AdversarialStage(run)
    stepper = Stepper(stage, run, total=6)
    found: dict[str, list[bool]] = {}
    for name, loss, _ in stage.steps(stepper.model, stepper.auxiliary, batch):
        stepper.accelerator.backward(loss, inputs=stepper._parameters[name])
        touched = [p.grad is not None for p in stage.auxiliary["critic"].parameters()]
        found[name] = touched
    assert not any(found["model"]) and all(found["critic"])
    rates = [stepper.optimizers[name].param_groups[0]["lr_ratio"] for name in ("model", "critic")]
    assert rates == [1.0, 2.0]


def test_a_run_of_one_optimizer_is_no_checkpoint_for_two(run: OracleRun, data: Path, tmp_path: Path) -> None:
    fit(OracleStage(run), run)
    with pytest.raises(UserError, match="optimizer state belongs to a different model"):
        resumed(run, data, tmp_path / "again")


class Smooth(NYUDepth):
    """Depth with a loss on differences between neighboring pixels, which needs whole maps."""

    def image_loss(
        self, logits: Mapping[str, torch.Tensor], labels: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        assert logits["depth"].shape[1:] == (16, 16, 16) and labels["depth"].shape[1:] == (16, 16)
        value = logits["depth"].diff(dim=1).square().mean((1, 2, 3))
        return value, {"smoothness": value.detach()}


def test_an_image_level_loss_is_added_to_the_pixels_loss(run: OracleRun) -> None:
    task = Smooth(TASKS["depth"].config)
    stage = OracleStage(run)
    nn.init.normal_(stage.oracle.label_head.heads["depth"].weight)
    stage.task = task
    labels = {"depth": torch.randint(16, (3, 16, 16), dtype=torch.uint8)}
    batch = Batch(
        image=torch.randint(256, (3, 3, 16, 16), dtype=torch.uint8),
        labels=labels,
        index=torch.arange(3),
        id=list("abc"),
    )
    stage.oracle.eval()
    loss, logs = stage.step(stage.model, batch)
    plain = stage.oracle(labels, batch["image"], task.loss)
    maps = stage.oracle.detokenize(plain.tokens, batch["image"])
    expected = maps["depth"].diff(dim=1).square().mean()
    torch.testing.assert_close(loss, plain.loss.mean() + expected)
    torch.testing.assert_close(logs["smoothness"], expected)
    loss.backward()
    assert all(p.grad is not None for p in stage.oracle.decoder.parameters())


def test_whole_maps_are_made_only_for_tasks_with_such_a_loss(run: OracleRun, monkeypatch: pytest.MonkeyPatch) -> None:
    assert OracleStage(run).image_loss is None
    monkeypatch.setattr(NYUDepth, "image_loss", Smooth.image_loss)
    assert OracleStage(run).image_loss is not None
    monkeypatch.undo()
    made: list[torch.Tensor] = []
    monkeypatch.setattr(LabelHead, "maps", lambda self, hidden: made.append(hidden))
    stage = OracleStage(run)
    labels = {"depth": torch.zeros(2, 16, 16, dtype=torch.uint8)}
    stage.oracle(labels, torch.zeros(2, 3, 16, 16, dtype=torch.uint8), stage.task.loss, stage.image_loss)
    assert not made
