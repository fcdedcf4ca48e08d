"""Memory by count: against the tensors that autograd really keeps, and shipped recipes against their hardware."""

from __future__ import annotations

import contextlib
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

from tests.support.paths import CONFIGS
from tests.support.small import TASKS, random_batch
from uvim_fsq.benchmark.memory import (
    LOGIT_BYTES,
    OVERHEAD,
    TrainingMemory,
    lm_memory,
    memory_of,
    oracle_memory,
    smallest_accumulate,
)
from uvim_fsq.benchmark.setup import read_sizes
from uvim_fsq.config.schema import EncoderConfig, LMModelConfig, OptimConfig, OracleModelConfig, OracleRun, TrainConfig
from uvim_fsq.experiments.ablation.devices import USABLE
from uvim_fsq.lm.autoregressive import AutoregressiveLM
from uvim_fsq.oracle import label_embedding as ends
from uvim_fsq.oracle.model import Oracle

CUDA = torch.device("cuda", 0)
RUN = OracleRun(task=None, train=TrainConfig(), optim=OptimConfig())


def flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_mask: Any = None, **given: Any) -> torch.Tensor:
    """What a GPU uses; without one torch would take the plain product, which keeps all scores."""
    attend = torch.ops.aten._scaled_dot_product_flash_attention
    return attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), 0.0, given.get("is_causal", False))[0]


@pytest.fixture()
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTensorMode]:
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda *_: True)
    monkeypatch.setattr("torch.cuda.device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(F, "scaled_dot_product_attention", flash)
    monkeypatch.setattr(ends, "BUDGET", 2**16)  # the label head keeps nothing
    with FakeTensorMode() as mode:
        yield mode


def on_cuda(module: nn.Module) -> Any:
    for part in module.modules():
        for name, p in part.named_parameters(recurse=False):
            setattr(part, name, nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device=CUDA)))
        for name, x in part.named_buffers(recurse=False):
            setattr(part, name, torch.empty(x.shape, dtype=x.dtype, device=CUDA))
    return module.train()


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


@pytest.mark.parametrize("task", TASKS)
def test_an_oracle_keeps_what_is_counted(task: str, fake: FakeTensorMode) -> None:
    batch = 5
    config = OracleModelConfig(8, 192, 2, 3, 3, 800, code_length=64)
    with unset_fake_temporarily():
        oracle = Oracle(config, TASKS[task].label_channels, 128)
        labels, image = random_batch(TASKS[task], batch, 128)
    oracle = on_cuda(oracle)
    labels = {name: fake.from_tensor(x).to(CUDA) for name, x in labels.items()}
    image = fake.from_tensor(image).to(CUDA)
    found = kept(oracle, lambda: oracle(labels, image, TASKS[task].loss))
    assert found == pytest.approx(batch * oracle_memory(oracle, RUN).image, rel=0.04)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_an_lm_keeps_what_is_counted(dropout: float, fake: FakeTensorMode) -> None:
    batch = 5
    encoder = EncoderConfig("vit_tiny_patch16_224", patch_size=8, width=160, depth=3, num_heads=2, mlp_dim=672)
    with unset_fake_temporarily():
        lm = AutoregressiveLM(LMModelConfig(encoder, 192, 2, 3, 800, dropout), image_size=128, vocab_size=50, length=64)
        oracle = Oracle(OracleModelConfig(8, 24, 1, 1, 3, 48, code_length=64), TASKS["depth"].label_channels, 128)
        tokens, image = torch.zeros(batch, 64, dtype=torch.long), torch.zeros(batch, 3, 128, 128, dtype=torch.uint8)
    lm = on_cuda(lm)
    tokens, image = fake.from_tensor(tokens).to(CUDA), fake.from_tensor(image).to(CUDA)

    def loss() -> torch.Tensor:
        return F.cross_entropy(lm(image, tokens).float().flatten(0, 1), tokens.flatten())

    assert kept(lm, loss) == pytest.approx(batch * lm_memory(lm, oracle, RUN).image, rel=0.04)


def header(file: Path) -> tuple[int, float] | None:
    """(processes, bytes of each one's GPU) that a shipped file says it needs; None for a CPU or any GPU."""
    found = re.search(r"^# hardware: (\d+)(?: or more)? GPUs? of (\d+) GB", file.read_text(), flags=re.MULTILINE)
    return (int(found[1]), USABLE * 1e9 * int(found[2])) if found else None


SHIPPED = [file for file in sorted(CONFIGS.rglob("*.yaml")) if file.parent.name != "ablations" and header(file)]


def test_there_are_recipes_for_large_hardware() -> None:
    assert len(SHIPPED) == 12 and {header(file) for file in SHIPPED} == {(8, 0.92 * 80e9), (1, 0.92 * 80e9)}


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
    # Nothing is cut finer than it must be.
    whole = replace(train, accumulate=1)
    assert smallest_accumulate(memory, whole, available, processes) == train.accumulate


def test_the_fewest_micro_batches_that_fit() -> None:
    memory, train = TrainingMemory(fixed=100.0, image=10.0), TrainConfig(batch_size=12)
    found = [smallest_accumulate(memory, train, available) for available in (220, 219, 160, 159, 139, 110, 109)]
    assert found == [1, 2, 2, 3, 4, 12, None]
    assert smallest_accumulate(memory, replace(train, accumulate=4), 1000) == 4
    assert smallest_accumulate(memory, replace(train, accumulate=5), 130) == 5, "uneven, but the user's own"
    assert smallest_accumulate(memory, train, 130, processes=2) == 2 and smallest_accumulate(memory, train, 120, 5) == 2
    logits = replace(memory, logits=2**27)
    assert logits.of(1) == 110 + LOGIT_BYTES * 2**27
    assert logits.of(3) == 130 + LOGIT_BYTES * 2**28  # done in pieces from there on


def test_what_does_not_depend_on_the_batch() -> None:
    def fixed(optim: str = "adamw", processes: int = 1, **train: Any) -> float:
        run = replace(RUN, train=TrainConfig(**train), optim=OptimConfig(name=optim))  # type: ignore[arg-type]
        with torch.device("meta"):
            oracle = Oracle(OracleModelConfig(8, 24, 1, 1, 3, 48, code_length=64), TASKS["depth"].label_channels, 128)
        count = sum(p.numel() for p in oracle.parameters())
        return (oracle_memory(oracle, run, processes).fixed - OVERHEAD) / count

    assert fixed(precision="fp32") == 16 and fixed() == 18 and fixed("adafactor") == 14
    assert fixed(processes=2) == 22 and fixed(ema=0.9) == 22
