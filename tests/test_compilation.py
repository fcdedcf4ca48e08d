"""torch.compile makes one graph per model, with equal results."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.support.small import TASKS, random_batch
from uvim_fsq.config.schema import EncoderConfig, LMModelConfig, OracleModelConfig, QuantizerConfig
from uvim_fsq.lm.autoregressive import AutoregressiveLM
from uvim_fsq.oracle import chunking, label_embedding
from uvim_fsq.oracle.label_embedding import ChunkedOneHotLinear
from uvim_fsq.oracle.model import Oracle

#: Dynamo and autograd's tracing without the C++ compiler, which takes a minute a model; a graph break is an error.
one_graph = functools.partial(torch.compile, fullgraph=True, dynamic=False, backend="aot_eager")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    ("kind", "context", "chunked"), [("fsq", "both", False), ("vq", "none", False), ("fsq", "none", True)]
)
def test_oracle_is_one_graph(
    task: str, kind: Any, context: Any, chunked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`chunked`: with one-hot labels and logits in chunks, as on a GPU."""
    torch.manual_seed(0)
    quantizer = QuantizerConfig(kind=kind, levels=(5, 5), codebook_size=16, codeword_dim=8, commitment=0.1)
    config = OracleModelConfig(4, 16, 1, 1, 2, 32, context, 4, "none", quantizer)
    oracle = Oracle(config, TASKS[task].label_channels, 16).train()
    for head in oracle.label_head.heads.values():
        torch.nn.init.normal_(head.weight)  # they start at zero
    if chunked:
        monkeypatch.setattr(label_embedding, "embedding_bag_linear", ChunkedOneHotLinear.apply)
        monkeypatch.setattr(chunking, "MAX_LOGITS", oracle.label_head.logits * 10)
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


@pytest.mark.slow
def test_lm_is_one_graph() -> None:
    torch.manual_seed(0)
    encoder = EncoderConfig("vit_tiny_patch16_224", patch_size=4, width=16, depth=1, num_heads=2, mlp_dim=32)
    lm = AutoregressiveLM(LMModelConfig(encoder, 16, 1, 2, 32), image_size=16, vocab_size=25, length=4).train()
    torch.nn.init.normal_(lm.head.weight)
    _, image = random_batch(TASKS["depth"], 3)
    tokens = torch.randint(0, 25, (3, 4))
    results = []
    for model in (lm, one_graph(lm)):
        loss, logs = model(image, tokens)
        loss.square().mean().backward()
        results.append((loss, logs, {name: p.grad for name, p in lm.named_parameters()}))
        lm.zero_grad()
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-5)
