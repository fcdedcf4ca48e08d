"""The chunked label loss equals the unchunked one, within MAX_LOGITS."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.support import oracles
from tests.support.largest_tensor import LargestTensor
from tests.support.small import TASKS, random_batch
from uvim_fsq.inference.predictions import label_maps
from uvim_fsq.layers import patchify
from uvim_fsq.oracle import chunking, label_embedding
from uvim_fsq.oracle.label_embedding import ChunkedOneHotLinear
from uvim_fsq.oracle.label_head import LabelHead, chunked_label_loss
from uvim_fsq.oracle.model import Oracle
from uvim_fsq.tasks.base import Categorical, Task

CONFIG = replace(oracles.CONFIG, code_dropout="none")


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
@pytest.mark.parametrize("chunks", ["examples", "patches", "a patch"])
def test_the_chunked_loss_equals_the_unchunked_one(task: Task, chunks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss, logs and gradients, in chunks of two examples, of 5 of 16 patches, and of one patch."""
    labels, image = random_batch(task, 3)
    results = []
    for whole in (True, False):
        torch.manual_seed(0)
        oracle = Oracle(CONFIG, task.label_channels, 16).train()
        for head in oracle.label_head.heads.values():
            torch.nn.init.normal_(head.weight, std=0.1)
        logits = oracle.label_head.logits
        size = {"examples": 2 * 16 * logits, "patches": 5 * logits + 3, "a patch": 1}[chunks]
        monkeypatch.setattr(chunking, "MAX_LOGITS", 2**28 if whole else size)
        out = oracle(labels, image, task.loss)
        (out.loss * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
        results.append((out.loss, out.logs, {n: p.grad for n, p in oracle.named_parameters()}))
    for expected, chunked in zip(*results, strict=True):
        torch.testing.assert_close(chunked, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_no_tensor_exceeds_the_limit(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward, whatever the batch, neither logits nor one-hot labels."""
    head = LabelHead(task.label_channels, 4, 2)
    most = 6 * head.logits  # of 16 patches, so that each example has three chunks
    for batch in (3, 5):
        labels, _ = random_batch(task, batch)
        patches = {name: patchify(x, 4) for name, x in labels.items()}
        hidden = torch.randn(batch, 16, 2, requires_grad=True)
        found = []
        for limit in (most, 2**28):
            monkeypatch.setattr(chunking, "MAX_LOGITS", limit)
            with LargestTensor(hidden.shape, *(p.shape for p in head.parameters())) as largest:
                value, _ = chunked_label_loss(head, hidden, patches, task.loss)
                value.mean().backward()
            found.append(largest.numbers)
        assert found[0] <= most < found[1]


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
@torch.no_grad()
def test_predictions_stay_below_the_limit(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    oracle = Oracle(replace(CONFIG, context="none"), task.label_channels, 16).eval()
    for head in oracle.label_head.heads.values():
        torch.nn.init.normal_(head.weight)
    codes, image = torch.randn(5, oracle.code_length, oracle.quantizer.dim), torch.zeros(5, 3, 16, 16)
    whole = list(oracle.iter_logits(codes, image))
    assert len(whole) == 1 and len(label_maps(oracle, task, codes, image)) == 5
    limit = 2 * oracle.num_patches * oracle.label_head.logits
    monkeypatch.setattr(chunking, "MAX_LOGITS", limit)
    chunks = list(oracle.iter_logits(codes, image))
    assert [len(next(iter(x.values()))) for x in chunks] == [2, 2, 1]
    assert len(label_maps(oracle, task, codes, image)) == 5
    for name, x in whole[0].items():
        torch.testing.assert_close(torch.cat([chunk[name] for chunk in chunks]), x, atol=1e-5, rtol=1e-5)
    assert sum(x.numel() for x in chunks[0].values()) == limit


@pytest.mark.slow
def test_a_compiled_model_keeps_no_one_hot_labels_or_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it keeps for the backward pass is small compared with the one-hot labels of the batch."""
    torch._dynamo.reset()
    monkeypatch.setattr(label_embedding, "embedding_bag_linear", ChunkedOneHotLinear.apply)  # as on a GPU
    channels = {"semantics": Categorical(134), "instances": Categorical(100)}
    config = replace(CONFIG, patch_size=8, context="none", code_length=4)
    oracle = Oracle(config, channels, 32).train()
    labels = {name: torch.randint(0, 100, (8, 32, 32)).to(torch.int16) for name in channels}
    numbers = 8 * oracle.num_patches * oracle.label_head.logits  # one-hot labels, and as many logits
    monkeypatch.setattr(chunking, "MAX_LOGITS", numbers // 8)
    mine = {p.data_ptr() for p in oracle.parameters()}
    kept: dict[int, int] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        if x.data_ptr() not in mine:
            kept[x.data_ptr()] = x.numel()
        return x

    # The backend with the compiler's own choice of what to keep, without its code generation.
    model = torch.compile(oracle, backend="aot_eager_decomp_partition", dynamic=False, fullgraph=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        value = model(labels, None, TASKS["panoptic"].loss).loss.mean()
    value.backward()
    assert 0 < sum(kept.values()) < 0.15 * numbers
    torch._dynamo.reset()


def test_gradients_of_chunks_are_added_in_full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under autocast the head's gradient is no worse with 32 chunks than with one."""
    torch.manual_seed(0)
    task = TASKS["depth"]
    head = LabelHead(task.label_channels, 4, 16)
    torch.nn.init.normal_(head.heads["depth"].weight, std=0.1)
    labels, _ = random_batch(task, 32)
    patches, hidden = {"depth": patchify(labels["depth"], 4)}, torch.randn(32, 16, 16)
    gradients = []
    for limit, low in ((2**28, False), (2**28, True), (16 * head.logits, True)):
        monkeypatch.setattr(chunking, "MAX_LOGITS", limit)
        head.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            value, _ = chunked_label_loss(head, hidden, patches, task.loss)
        value.mean().backward()
        gradients.append(torch.nn.utils.parameters_to_vector(p.grad for p in head.parameters()))
    exact, whole, chunked = gradients
    assert (chunked - exact).norm() < 1.2 * (whole - exact).norm()


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
def test_memory_on_a_gpu_does_not_grow_with_the_batch(compile: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """At 59,904 logits a patch, four times the batch adds its hidden states and labels, but not its logits."""
    monkeypatch.setattr(chunking, "MAX_LOGITS", 2**25)
    channels = {"semantics": Categorical(134), "instances": Categorical(100)}
    oracle = Oracle(replace(CONFIG, patch_size=16, context="none"), channels, 128).cuda().train()
    peaks = []
    for batch in (16, 64):
        labels = {n: torch.zeros(batch, 128, 128, dtype=torch.int16, device="cuda") for n in channels}
        model = torch.compile(oracle, dynamic=False) if compile else oracle
        for _ in range(2):
            torch.cuda.reset_peak_memory_stats()
            with torch.autocast("cuda", torch.bfloat16):
                value = model(labels, None, TASKS["panoptic"].loss).loss.mean()
            value.backward()
        peaks.append(torch.cuda.max_memory_allocated())
    logits = 64 * 64 * oracle.label_head.logits
    assert peaks[1] - peaks[0] < 0.25 * 2 * logits  # a quarter of the larger batch's logits in bf16
