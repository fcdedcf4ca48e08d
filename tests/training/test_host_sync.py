"""An optimizer step never waits for the device, and uses flash attention."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.host_sync import NoHostSync
from tests.support.small import stage_run
from uvim_fsq.data.batch import to_device
from uvim_fsq.data.sample import Batch
from uvim_fsq.layers import Attention
from uvim_fsq.training.stages import build_stage
from uvim_fsq.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Kernels(TorchDispatchMode):
    """Names of the operators that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("stage", ["oracle", "lm", "masked", "direct"])
def test_training_uses_flash_attention(stage: str, tmp_path: Path, data: Path, oracle_dir: Path) -> None:
    trainer, batches = trainer_and_batches(stage_run(stage, tmp_path, data, oracle_dir))
    with Kernels() as kernels:
        trainer.stepper.optimizer_step(batches, unheard)
    attention = {name for name in kernels.names if "attention" in name}
    kernel = "_scaled_dot_product_flash_attention_for_cpu"
    assert attention == {kernel, f"{kernel}_backward"} or trainer.device.type != "cpu"
    assert not any("math" in name for name in attention)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [12, 16])
def test_flash_or_cudnn_attention_runs_at_full_size(heads: int) -> None:
    """Self-attention of oracle and image encoder, causal and cross-attention of the LM, in bf16, backward too."""
    own = Attention(64 * heads, heads).cuda()
    patches = torch.randn(2, 1024, 64 * heads, device="cuda", requires_grad=True)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION]):
        with torch.autocast("cuda", torch.bfloat16):
            tokens = patches[:, :256]
            out = own(patches).sum() + own(tokens, is_causal=True).sum() + own(tokens, patches).sum()
        out.backward()
    assert patches.grad is not None and bool(torch.isfinite(patches.grad).all())


def unheard(seconds: float) -> None:
    """Stands in for the display, which is told how long data took."""


def trainer_and_batches(run: Any) -> tuple[Trainer, Iterator[Batch]]:
    trainer = Trainer(build_stage(run), run)
    batches = [to_device(batch, trainer.device) for batch in trainer.loader.batches(0, 3)]
    return trainer, iter(batches)


@pytest.mark.parametrize("stage", ["oracle", "lm", "masked", "direct"])
def test_no_step_reads_a_value(stage: str, tmp_path: Path, data: Path, oracle_dir: Path) -> None:
    run = stage_run(stage, tmp_path, data, oracle_dir, "train.ema=0.9", "train.precision=bf16")
    trainer, batches = trainer_and_batches(run)
    trainer.stepper.optimizer_step(batches, unheard)
    with NoHostSync():
        logs = trainer.stepper.optimizer_step(batches, unheard)
    assert torch.isfinite(logs["loss"])
    with pytest.raises(AssertionError, match="waits"), NoHostSync():
        bool(logs["loss"] > 0)


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
@pytest.mark.parametrize("stage", ["oracle", "lm", "masked", "direct"])
def test_no_step_waits_for_the_gpu(
    stage: str, optimizer: str, compile: bool, tmp_path: Path, data: Path, oracle_dir: Path
) -> None:
    keys = ["train.ema=0.9", "train.precision=bf16", f"optim.name={optimizer}", f"train.compile={compile}".lower()]
    trainer, batches = trainer_and_batches(stage_run(stage, tmp_path, data, oracle_dir, *keys))
    for _ in range(2):
        trainer.stepper.optimizer_step(batches, unheard)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        logs = trainer.stepper.optimizer_step(batches, unheard)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(logs["loss"])
