"""torch.compile: one graph per model, the same numbers, ordinary checkpoints; and no step waits for its numbers."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.compiler import needs_compiler
from tests.support.small import TASKS, lm_run, oracle_run, random_batch
from tests.test_loop import losses, weights
from uvim_fsq.checkpoints import files as ckpt
from uvim_fsq.checkpoints.loading import load_checkpoint
from uvim_fsq.config.schema import EncoderConfig, LMModelConfig, OracleModelConfig, QuantizerConfig
from uvim_fsq.data.batch import to_device
from uvim_fsq.data.sample import Batch
from uvim_fsq.layers import Attention
from uvim_fsq.lm.autoregressive import AutoregressiveLM
from uvim_fsq.oracle import label_embedding as ends
from uvim_fsq.oracle.label_embedding import ChunkedOneHotLinear
from uvim_fsq.oracle.model import Oracle
from uvim_fsq.training import stages, step
from uvim_fsq.training.loop import fit
from uvim_fsq.training.stages import build_stage
from uvim_fsq.training.trainer import Trainer

#: Dynamo and autograd's tracing without the C++ compiler, which takes a minute a model; a graph break is an error.
one_graph = functools.partial(torch.compile, fullgraph=True, dynamic=False, backend="aot_eager")

VQ = ("model.quantizer.kind=vq", "model.quantizer.codebook_size=16", "model.quantizer.codeword_dim=8")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    ("kind", "context", "many"), [("fsq", "both", False), ("vq", "none", False), ("fsq", "none", True)]
)
def test_oracle_is_one_graph(task: str, kind: Any, context: Any, many: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """`many`: with both ends in pieces, and the label embedding as on a GPU."""
    torch.manual_seed(0)
    quantizer = QuantizerConfig(kind=kind, levels=(5, 5), codebook_size=16, codeword_dim=8, commitment=0.1)
    config = OracleModelConfig(4, 16, 1, 1, 2, 32, context, 4, "none", quantizer)
    oracle = Oracle(config, TASKS[task].label_channels, 16).train()
    for head in oracle.label_head.heads.values():
        torch.nn.init.normal_(head.weight)  # they start at zero
    if many:
        monkeypatch.setattr(ends, "bag_of_rows", ChunkedOneHotLinear.apply)
        monkeypatch.setattr(ends, "BUDGET", oracle.label_head.logits * 10)
    labels, image = random_batch(TASKS[task], 2)
    results = []
    for model, tokenize in ((oracle, oracle.tokenize), (one_graph(oracle), one_graph(oracle.tokenize))):
        out = model(labels, image, TASKS[task].loss)
        out.loss.mean().backward()
        gradients = {name: p.grad for name, p in oracle.named_parameters()}
        oracle.zero_grad()
        with torch.no_grad():
            results.append((out.loss, out.logs, gradients, tokenize(labels, image)))
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-5)


def test_lm_is_one_graph() -> None:
    torch.manual_seed(0)
    encoder = EncoderConfig("vit_tiny_patch16_224", patch_size=4, width=16, depth=1, num_heads=2, mlp_dim=32)
    lm = AutoregressiveLM(LMModelConfig(encoder, 16, 1, 2, 32), image_size=16, vocab_size=25, length=4).train()
    torch.nn.init.normal_(lm.head.weight)
    _, image = random_batch(TASKS["depth"], 3)
    tokens = torch.randint(0, 25, (3, 4))
    results = []
    for model in (lm, one_graph(lm)):
        logits = model(image, tokens)
        logits.square().mean().backward()
        results.append((logits, {name: p.grad for name, p in lm.named_parameters()}))
        lm.zero_grad()
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-5)


def run_of(stage: str, out: Path, data: Path, oracle_dir: Path, *keys: str) -> Any:
    return oracle_run(out, data, *keys) if stage == "oracle" else lm_run(out, oracle_dir, *keys)


def _train_compiled(stage: str, tmp_path: Path, data: Path, oracle_dir: Path, precision: str) -> None:
    """Losses as without, plain names, resumption, evaluation and averaged weights."""
    keys = [f"train.precision={precision}", "train.ema=0.9", "train.save_every=3", "train.accumulate=2"]
    keys += ["model.code_dropout=none"] if stage == "oracle" else []
    plain, whole, halves = (run_of(stage, tmp_path / n, data, oracle_dir, *keys) for n in ("plain", "whole", "halves"))
    fit(build_stage(plain), plain)
    for run in (whole, halves):
        run = replace(run, train=replace(run.train, compile=True))
        fit(build_stage(run), run)
    for late in ckpt.checkpoints(tmp_path / "halves")[1:]:
        late.rename(tmp_path / late.name)
    again = replace(halves, train=replace(halves.train, compile=True, resume="auto"))
    fit(build_stage(again), again)
    far = 1e-5 if precision == "fp32" else 2e-2
    assert losses(tmp_path / "whole") == pytest.approx(losses(tmp_path / "plain"), abs=far)
    assert losses(tmp_path / "whole") == losses(tmp_path / "halves")
    one, two = weights(tmp_path / "whole"), weights(tmp_path / "halves")
    assert one.keys() == weights(tmp_path / "plain").keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    load_checkpoint(tmp_path / "whole")


@pytest.mark.parametrize("stage", ["oracle", "lm"])
def test_training_in_one_graph(
    stage: str, tmp_path: Path, data: Path, oracle_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (step, stages):
        monkeypatch.setattr(module, "compiled", one_graph)
    _train_compiled(stage, tmp_path, data, oracle_dir, "fp32")


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("stage", ["oracle", "lm"])
def test_training_compiled(stage: str, tmp_path: Path, data: Path, oracle_dir: Path) -> None:
    _train_compiled(stage, tmp_path, data, oracle_dir, "bf16")


class Kernels(TorchDispatchMode):
    """Names of the operators that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("stage", ["oracle", "lm"])
def test_training_uses_flash_attention(stage: str, tmp_path: Path, data: Path, oracle_dir: Path) -> None:
    trainer, batches = trainer_and_batches(run_of(stage, tmp_path, data, oracle_dir))
    with Kernels() as kernels:
        trainer.stepper.optimizer_step(batches, unheard)
    attention = {name for name in kernels.names if "attention" in name}
    way = "_scaled_dot_product_flash_attention_for_cpu"
    assert attention == {way, f"{way}_backward"} or trainer.device.type != "cpu"
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


class NoWaiting(TorchDispatchMode):
    """Refuses what makes the host wait for a GPU: reading a value, and shapes that depend on values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masked = name in ("index", "index_put", "index_put_") and any(
            x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]
        )
        waits = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "repeat_interleave")
        assert name not in waits and not masked, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


def unheard(seconds: float) -> None:
    """Stands in for the display, which is told how long data took."""


def trainer_and_batches(run: Any) -> tuple[Trainer, Iterator[Batch]]:
    trainer = Trainer(build_stage(run), run)
    batches = [to_device(batch, trainer.device) for batch in trainer.loader.batches(0, 3)]
    return trainer, iter(batches)


@pytest.mark.parametrize("stage", ["oracle", "lm"])
def test_nothing_in_a_step_reads_a_value(stage: str, tmp_path: Path, data: Path, oracle_dir: Path) -> None:
    run = run_of(stage, tmp_path, data, oracle_dir, "train.ema=0.9", "train.precision=bf16")
    trainer, batches = trainer_and_batches(run)
    trainer.stepper.optimizer_step(batches, unheard)
    with NoWaiting():
        logs = trainer.stepper.optimizer_step(batches, unheard)
    assert torch.isfinite(logs["loss"])
    with pytest.raises(AssertionError, match="waits"), NoWaiting():
        bool(logs["loss"] > 0)


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
@pytest.mark.parametrize("stage", ["oracle", "lm"])
def test_no_step_waits_for_the_gpu(
    stage: str, optimizer: str, compile: bool, tmp_path: Path, data: Path, oracle_dir: Path
) -> None:
    keys = ["train.ema=0.9", "train.precision=bf16", f"optim.name={optimizer}", f"train.compile={compile}".lower()]
    trainer, batches = trainer_and_batches(run_of(stage, tmp_path, data, oracle_dir, *keys))
    for _ in range(2):
        trainer.stepper.optimizer_step(batches, unheard)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        logs = trainer.stepper.optimizer_step(batches, unheard)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(logs["loss"])
