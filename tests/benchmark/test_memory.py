"""Counted training memory, against the tensors that autograd keeps and the hardware that shipped recipes name."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from tests.support.fake_cuda import CUDA, allow_cuda_autocast, on_cuda
from tests.support.paths import CONFIGS
from tests.support.small import TASKS, random_batch
from uvim_fsq.benchmark.memory import (
    direct_memory,
    lm_memory,
    memory_of,
    oracle_memory,
)
from uvim_fsq.benchmark.setup import read_sizes
from uvim_fsq.config.schema import (
    DirectModelConfig,
    EncoderConfig,
    LMModelConfig,
    LMRun,
    LossConfig,
    OptimConfig,
    OracleModelConfig,
    OracleRun,
    TrainConfig,
)
from uvim_fsq.direct.model import DirectModel
from uvim_fsq.lm.autoregressive import AutoregressiveLM
from uvim_fsq.lm.base import TokenModel
from uvim_fsq.lm.masked import MaskedLM
from uvim_fsq.oracle import chunking
from uvim_fsq.oracle.label_decoder import TrainedDecoder
from uvim_fsq.oracle.model import Oracle
from uvim_fsq.performance.memory import OVERHEAD, USABLE, smallest_accumulate

RUN = OracleRun(task=None, train=TrainConfig(), optim=OptimConfig())
LM_RUN = LMRun("", train=TrainConfig(), optim=OptimConfig())


def flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_mask: Any = None, **given: Any) -> torch.Tensor:
    """The kernel of a GPU; the one that torch uses on a CPU keeps all attention scores."""
    attend = torch.ops.aten._scaled_dot_product_flash_attention
    return attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), 0.0, given.get("is_causal", False))[0]


@pytest.fixture()
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTensorMode]:
    allow_cuda_autocast(monkeypatch)
    monkeypatch.setattr(F, "scaled_dot_product_attention", flash)
    monkeypatch.setattr(chunking, "MAX_LOGITS", 2**16)  # the label head keeps nothing
    with FakeTensorMode() as mode:
        yield mode


def kept(module: nn.Module, forward: Callable[[], object]) -> int:
    """Bytes that autograd keeps from `forward` on, parameters and their copies in low precision left out."""
    shapes = {shape for p in module.parameters() for shape in (tuple(p.shape), tuple(p.shape)[::-1])}
    storages: dict[int, tuple[Any, int]] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        if tuple(x.shape) not in shapes:
            storage = x.untyped_storage()
            storages[storage._cdata] = storage, storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), torch.autocast("cuda", torch.bfloat16):
        forward()
    return sum(size for _, size in storages.values())


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_an_oracle_keeps_the_counted_bytes(task: str, fake: FakeTensorMode) -> None:
    batch = 5
    config = OracleModelConfig(8, 192, 2, 3, 3, 800, code_length=64)
    with unset_fake_temporarily():
        oracle = Oracle(config, TASKS[task].label_channels, 128)
        labels, image = random_batch(TASKS[task], batch, 128)
    oracle = on_cuda(oracle).train()
    labels = {name: fake.from_tensor(x).to(CUDA) for name, x in labels.items()}
    image = fake.from_tensor(image).to(CUDA)
    found = kept(oracle, lambda: oracle(labels, image, TASKS[task].loss))
    assert found == pytest.approx(batch * oracle_memory(oracle, RUN).image, rel=0.04)


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("kind", [AutoregressiveLM, MaskedLM])
def test_an_lm_keeps_the_counted_bytes(kind: type[TokenModel], dropout: float, fake: FakeTensorMode) -> None:
    batch = 5
    encoder = EncoderConfig("vit_tiny_patch16_224", patch_size=8, width=160, depth=3, num_heads=2, mlp_dim=672)
    with unset_fake_temporarily():
        lm = kind(LMModelConfig(encoder, 192, 2, 3, 800, dropout), image_size=128, vocab_size=50, length=64)
        oracle = Oracle(OracleModelConfig(8, 24, 1, 1, 3, 48, code_length=64), TASKS["depth"].label_channels, 128)
        tokens, image = torch.zeros(batch, 64, dtype=torch.long), torch.zeros(batch, 3, 128, 128, dtype=torch.uint8)
    lm = on_cuda(lm).train()
    tokens, image = fake.from_tensor(tokens).to(CUDA), fake.from_tensor(image).to(CUDA)

    assert kept(lm, lambda: lm(image, tokens)) == pytest.approx(batch * lm_memory(lm, oracle, LM_RUN).image, rel=0.04)


@pytest.mark.slow
@pytest.mark.parametrize("decoder", ["frozen", "trained"])
def test_the_task_loss_keeps_the_counted_bytes_of_the_decoder(decoder: str, fake: FakeTensorMode) -> None:
    batch, task = 5, TASKS["depth"]
    with unset_fake_temporarily():
        oracle = Oracle(OracleModelConfig(8, 192, 1, 4, 3, 800, code_length=64), task.label_channels, 128)
        lm = AutoregressiveLM(LMModelConfig(depth=1), image_size=128, vocab_size=50, length=64)
        labels, image = random_batch(task, batch, 128)
        codes = torch.zeros(batch, 64, oracle.quantizer.dim)
        if decoder == "trained":
            lm.label_decoder = TrainedDecoder(oracle)
    used = on_cuda(oracle if decoder == "frozen" else lm.label_decoder).requires_grad_(decoder == "trained")
    labels = {name: fake.from_tensor(x).to(CUDA) for name, x in labels.items()}
    image, codes = fake.from_tensor(image).to(CUDA), fake.from_tensor(codes).to(CUDA).requires_grad_()
    found = kept(used, lambda: used.label_loss(codes, labels, image, task.loss))
    with_loss = replace(LM_RUN, loss=LossConfig(1.0))
    counted = lm_memory(lm, oracle, with_loss).image - lm_memory(lm, oracle, LM_RUN).image
    assert found == pytest.approx(batch * counted, rel=0.04)


@pytest.mark.slow
@pytest.mark.parametrize("patch_size", [8, 16])
def test_a_direct_model_keeps_the_counted_bytes(patch_size: int, fake: FakeTensorMode) -> None:
    batch, task = 5, TASKS["depth"]
    encoder = EncoderConfig("vit_tiny_patch16_224", patch_size=8, width=160, depth=3, num_heads=2, mlp_dim=672)
    with unset_fake_temporarily():
        direct = DirectModel(DirectModelConfig(encoder, patch_size, 192, 3, 3, 800), task.label_channels, 128)
        labels, image = random_batch(task, batch, 128)
    direct = on_cuda(direct).train()
    labels = {name: fake.from_tensor(x).to(CUDA) for name, x in labels.items()}
    image = fake.from_tensor(image).to(CUDA)
    found = kept(direct, lambda: direct(labels, image, task.loss))
    assert found == pytest.approx(batch * direct_memory(direct, RUN).image, rel=0.04)


def header(file: Path) -> tuple[int, float] | None:
    """(processes, bytes of each one's GPU) that a shipped file says it needs; None for a CPU or any GPU."""
    found = re.search(r"^# hardware: (\d+)(?: or more)? GPUs? of (\d+) GB", file.read_text(), flags=re.MULTILINE)
    return (int(found[1]), USABLE * 1e9 * int(found[2])) if found else None


SHIPPED = [file for file in sorted(CONFIGS.rglob("*.yaml")) if file.parent.name != "ablations" and header(file)]


def test_recipes_name_their_hardware() -> None:
    assert len(SHIPPED) == 27
    assert {header(file) for file in SHIPPED} == {(8, 0.92 * 80e9), (1, 0.92 * 80e9), (1, 0.92 * 24e9)}


@pytest.mark.slow
@pytest.mark.parametrize("file", SHIPPED, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_shipped_recipes_fit_the_hardware_they_name(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = header(file)
    assert asked is not None
    processes, available = asked
    sizes = read_sizes(file)
    train = sizes.run.train
    memory = memory_of(sizes.oracle, sizes.lm, processes)
    assert memory.of(train.batch_size // train.accumulate // processes) <= available
    assert smallest_accumulate(memory, train, available, processes) == train.accumulate
    # No recipe accumulates more than necessary.
    whole = replace(train, accumulate=1)
    assert smallest_accumulate(memory, whole, available, processes) == train.accumulate


def test_bytes_per_parameter_follow_precision_optimizer_and_processes() -> None:
    def fixed(optim: str = "adamw", processes: int = 1, **train: Any) -> float:
        run = replace(RUN, train=TrainConfig(**train), optim=OptimConfig(name=optim))
        with torch.device("meta"):
            oracle = Oracle(OracleModelConfig(8, 24, 1, 1, 3, 48, code_length=64), TASKS["depth"].label_channels, 128)
        count = sum(p.numel() for p in oracle.parameters())
        return (oracle_memory(oracle, run, processes).fixed - OVERHEAD) / count

    assert fixed(precision="fp32") == 16 and fixed() == 18 and fixed("adafactor") == 14
    assert fixed(processes=2) == 22 and fixed(ema=0.9) == 22


def test_frozen_parameters_need_no_gradients_and_no_optimizer_state() -> None:
    def fixed(frozen: bool, **train: Any) -> float:
        run = LMRun("", train=TrainConfig(**train), optim=OptimConfig(name="adamw"))
        with torch.device("meta"):
            encoder = EncoderConfig("vit_tiny_patch16_224", frozen=frozen, out_width=8)
            lm = AutoregressiveLM(LMModelConfig(encoder, 16, 1, 2, 32), image_size=32, vocab_size=9, length=4)
            oracle = Oracle(OracleModelConfig(8, 24, 1, 1, 3, 48, code_length=4), TASKS["depth"].label_channels, 32)
        model = sum(p.numel() for name, p in lm.named_parameters() if name.startswith("encoder.model."))
        learned = sum(p.numel() for p in lm.parameters()) - model
        others = (22 if train else 18) * learned + 6 * sum(p.numel() for p in oracle.parameters())
        return (lm_memory(lm, oracle, run).fixed - OVERHEAD - others) / model

    assert fixed(False) == 18 and fixed(True) == 6 and fixed(True, ema=0.9) == 10
