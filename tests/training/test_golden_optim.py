"""Twelve steps of the reference's optimizer, taken by our training step: schedule, clipping, rates and decay."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from timm.layers.attention import Attention as TimmAttention
from torch import nn

from tests.support.golden import golden
from tests.support.small import LM
from uvim_fsq.config.schema import EncoderConfig, Run
from uvim_fsq.data.sample import Batch
from uvim_fsq.inference.predictions import PredictFn
from uvim_fsq.layers import Attention
from uvim_fsq.lm.image_encoder import ImageEncoder
from uvim_fsq.tasks.configuration import load_run
from uvim_fsq.training.optim import decays, schedule
from uvim_fsq.training.stages import Stage
from uvim_fsq.training.step import Stepper

GOLDEN = golden("optim.npz")


CASES = ("stage1", "stage2", "strong_decay")


STEPS = 12


#: Our module's name -> the reference's dense kernel.
DENSE = {"encoder.model.mlp": "encoder/Dense_0", "head": "head", "small": "small"}


OTHERS = {
    "encoder.model.norm.weight": "encoder/LayerNorm_0/scale",
    "encoder.model.pos_embed": "encoder/posembed_input/pos_embedding",
    "encoder.model.mlp.bias": "encoder/Dense_0/bias",
    "head.bias": "head/bias",
}


QUERY = "encoder/query/kernel"


class Encoder(ImageEncoder):
    """An image encoder whose model is empty."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.config, self.model = EncoderConfig(), nn.Module()


class Tree(nn.Module):
    """The golden file's parameters as our models hold them; `packed`: query, key and value in one, as timm."""

    def __init__(self, packed: bool) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.encoder.model.mlp = nn.Linear(48, 40)
        self.encoder.model.norm = nn.LayerNorm(40, bias=False)
        self.encoder.model.pos_embed = nn.Parameter(torch.zeros(1, 36, 40))
        if packed:
            self.encoder.model.attn = TimmAttention(40, 4, attn_head_dim=36)
        else:
            self.encoder.model.attn = Attention(144, 4, memory_dim=40, bias=False)
        self.head = nn.Linear(40, 64)
        self.small = nn.Linear(16, 40, bias=False)

    def ours(self, arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
        """Golden arrays under our names and in our layouts. Packed: the query's kernel is that of the keys."""
        found = {ours: torch.tensor(arrays[theirs]) for ours, theirs in OTHERS.items()}
        found |= {f"{ours}.weight": torch.tensor(arrays[f"{theirs}/kernel"]).T for ours, theirs in DENSE.items()}
        query = torch.tensor(arrays[QUERY]).flatten(1).T
        if isinstance(self.encoder.model.attn, Attention):
            return {**found, "encoder.model.attn.key.weight": query}
        return {
            **found,
            "encoder.model.attn.qkv.weight": torch.cat([torch.zeros_like(query), query, torch.zeros_like(query)]),
        }


class GivenGradients(Stage):
    """A stage whose gradients are a batch's `labels`."""

    name = "lm"

    def __init__(self, run: Run, model: nn.Module) -> None:
        super().__init__(run)
        self.model = model

    def step(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        parameters = dict(model.named_parameters())
        products = [(parameters[name] * gradient).sum() for name, gradient in batch["labels"].items()]
        return torch.stack(products).sum(), {}

    def train_flops(self) -> float:
        raise NotImplementedError

    def predictions(self, model: nn.Module, device: torch.device) -> PredictFn:
        raise NotImplementedError


def group(prefix: str) -> dict[str, np.ndarray]:
    return {str(name): GOLDEN[f"{prefix}/{name}"] for name in GOLDEN["names"]}


def run_of(case: str) -> Any:
    clip = float(GOLDEN[f"{case}/clip_norm"])
    keys = [
        "optim.name=adafactor",
        f"optim.lr={float(GOLDEN[f'{case}/lr'])}",
        f"optim.weight_decay={float(GOLDEN[f'{case}/wd'])}",
        f"optim.encoder_lr_ratio={float(GOLDEN[f'{case}/encoder_lr_ratio'])}",
        f"optim.clip_norm={clip or 'null'}",
        "optim.warmup_steps=4",
    ]
    return load_run(LM, ["train.out=unused", "oracle=unused", f"train.steps={STEPS}", *keys])


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True], ids=["separate", "packed"])
@pytest.mark.parametrize("case", CASES)
def test_twelve_steps_equal_the_reference(case: str, packed: bool) -> None:
    """The movement of every parameter since the start, at every stored step, within 1e-3 of its largest entry."""
    tree = Tree(packed)
    start = tree.ours(group("init"))
    tree.load_state_dict({**tree.state_dict(), **start})
    run = run_of(case)
    stepper = Stepper(GivenGradients(run, tree), run, total=STEPS)

    def batches() -> Iterator[Batch]:
        for step in range(STEPS):
            gradients = tree.ours(group(f"grad/{step}"))
            yield Batch(image=torch.zeros(LM["train"]["batch_size"]), labels=gradients, index=torch.zeros(1), id=[])

    given = batches()
    for step in range(1, STEPS + 1):
        stepper.optimizer_step(given, lambda seconds: None)
        if f"{case}/after/{step}/{QUERY}" not in GOLDEN:
            continue
        wanted, now = tree.ours(group(f"{case}/after/{step}")), tree.state_dict()
        for name, there in wanted.items():
            moved, should = now[name].cpu() - start[name], there - start[name]
            assert torch.equal(moved, should) if step == 1 else should.abs().max() > 0, name
            far = (moved - should).abs().max() / should.abs().max().clamp_min(1e-12)
            assert far < 1e-3, f"{name} after {step} steps: {far:.1e}"


@pytest.mark.parametrize("case", CASES)
def test_the_schedule_equals_the_reference(case: str) -> None:
    optim = run_of(case).optim
    found = [schedule(step, STEPS, optim) for step in range(STEPS)]
    np.testing.assert_allclose(found, GOLDEN[f"{case}/schedule"], atol=1e-7)


def test_only_kernels_decay_as_in_the_reference() -> None:
    tree = Tree(packed=True)
    kernels = {f"{name}.weight" for name in (*DENSE, "encoder.model.attn.qkv", "encoder.model.attn.proj")}
    assert {name for name, p in tree.named_parameters() if decays(name, p)} == kernels


def test_the_golden_file_holds_all_steps() -> None:
    stored = {int(key.split("/")[2]) for key in GOLDEN if key.startswith("stage1/after/")}
    assert stored == {1, 2, 3, 6, 12}
