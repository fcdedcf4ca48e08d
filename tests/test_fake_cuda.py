"""The code paths of a GPU without one: tensors that have a device, a type and a shape but no numbers.

Finds tensors left on the host, types that do not go together under autocast, and values that are read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from tests.support.small import TASKS, random_batch
from uvim_fsq.config.schema import EncoderConfig, LMModelConfig, OracleModelConfig, QuantizerConfig
from uvim_fsq.lm import kv_cache as cache
from uvim_fsq.lm import token_generator as generate
from uvim_fsq.lm.autoregressive import AutoregressiveLM
from uvim_fsq.lm.sampling import Sampling
from uvim_fsq.lm.token_generator import GREEDY, TokenGenerator
from uvim_fsq.oracle import label_embedding as ends
from uvim_fsq.oracle.model import Oracle
from uvim_fsq.oracle.quantizers.vq import VQ

CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTensorMode]:
    """Inside, `Tensor.to(CUDA)` works everywhere and autocast believes in the device."""
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda *_: True)
    monkeypatch.setattr("torch.cuda.device", lambda _: contextlib.nullcontext())
    with FakeTensorMode() as mode:
        yield mode


def on_cuda(module: nn.Module) -> Any:
    """The module with fake parameters and buffers; `Module.to` cannot swap kinds of tensors."""
    for part in module.modules():
        for name, p in part.named_parameters(recurse=False):
            setattr(part, name, nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device=CUDA)))
        for name, x in part.named_buffers(recurse=False):
            setattr(part, name, torch.empty(x.shape, dtype=x.dtype, device=CUDA))
    return module


def real_models(task: str, kind: Any = "fsq", context: Any = "both") -> tuple[Oracle, AutoregressiveLM]:
    torch.manual_seed(0)
    quantizer = QuantizerConfig(kind=kind, levels=(5, 5), codebook_size=25, codeword_dim=8, commitment=0.1)
    config = OracleModelConfig(4, 16, 1, 1, 2, 32, context, 4, "none", quantizer)
    encoder = EncoderConfig("vit_tiny_patch16_224", patch_size=4, width=16, depth=1, num_heads=2, mlp_dim=32)
    lm = AutoregressiveLM(LMModelConfig(encoder, 16, 1, 2, 32), image_size=16, vocab_size=25, length=4)
    return Oracle(config, TASKS[task].label_channels, 16), lm


def batch_on_cuda(task: str, mode: FakeTensorMode) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    with torch._subclasses.fake_tensor.unset_fake_temporarily():
        labels, image = random_batch(TASKS[task], 3)
    return {name: mode.from_tensor(x).to(CUDA) for name, x in labels.items()}, mode.from_tensor(image).to(CUDA)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    ("kind", "context", "many"), [("fsq", "both", False), ("vq", "none", False), ("fsq", "none", True)]
)
def test_both_stages(task: str, kind: Any, context: Any, many: bool, fake: FakeTensorMode, monkeypatch: Any) -> None:
    with torch._subclasses.fake_tensor.unset_fake_temporarily():
        oracle, lm = real_models(task, kind, context)
    oracle, lm = on_cuda(oracle).train(), on_cuda(lm).train()
    if many:
        monkeypatch.setattr(ends, "BUDGET", oracle.label_head.logits * 10)
    labels, image = batch_on_cuda(task, fake)
    with torch.autocast("cuda", torch.bfloat16):
        out = oracle(labels, image, TASKS[task].loss)
        if isinstance(oracle.quantizer, VQ):
            oracle.quantizer.accumulate(out.bottleneck, out.tokens)
        logits = lm(image, oracle.tokenize(labels, image))
        loss = F.cross_entropy(logits.float().flatten(0, 1), out.tokens.flatten())
    assert logits.dtype == torch.bfloat16  # or autocast was off
    for x in (out.loss, *out.logs.values(), loss):
        assert (x.device, x.dtype) == (CUDA, torch.float32)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.8, top_k=5), Sampling(1.0, top_p=0.9)])
def test_decoding(precision: str, int8: bool, sampling: Sampling, fake: FakeTensorMode, monkeypatch: Any) -> None:
    with torch._subclasses.fake_tensor.unset_fake_temporarily():
        lm = real_models("depth")[1]
        lm = generate._with_bf16_weights(lm) if precision == "bf16" else lm
    monkeypatch.setattr(generate, "_with_bf16_weights", lambda model: model)
    monkeypatch.setattr(generate, "example_uniforms", lambda seeds, length: torch.zeros(len(seeds), length).double())
    captured: list[int] = []
    monkeypatch.setattr(TokenGenerator, "_capture", lambda self, buffers, span: captured.append(span))
    monkeypatch.setattr(generate, "SPAN", 3)  # of 4 positions
    monkeypatch.setattr(cache, "_COMPILED", {"to_int8": cache.to_int8, "attend_int8": cache.attend_int8})
    decoder = TokenGenerator(on_cuda(lm).eval(), sampling, precision=precision, int8=int8)
    image = batch_on_cuda("depth", fake)[1]
    image = image.repeat(4, 1, 1, 1)
    # 7 and 3 are padded; 1 is few beside 9; 12 takes the place of 9.
    for count, sizes in ((9, [9]), (7, [9]), (3, [9]), (1, [9, 1]), (12, [1, 12]), (5, [1, 12])):
        tokens = decoder(image[:count])
        assert (tokens.device, tokens.dtype, tuple(tokens.shape)) == (CUDA, torch.int64, (count, 4))
        assert list(decoder._buffers) == sizes
    assert sorted(captured) == [3, 3, 3, 4, 4, 4]  # once for 9, 1 and 12


def test_mistakes_are_found() -> None:
    x = torch.ones(3, device=CUDA)
    with pytest.raises(RuntimeError, match="cuda:0, cpu"):
        x + torch.ones(3)
    with pytest.raises(DataDependentOutputException):
        x.sum().item()
