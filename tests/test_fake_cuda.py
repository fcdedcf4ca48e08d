"""GPU code paths without a GPU, on tensors that have a device, a dtype and a shape but no numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.support.fake_cuda import CUDA, allow_cuda_autocast, on_cuda
from tests.support.small import TASKS, random_batch
from uvim_fsq.config.schema import (
    DirectModelConfig,
    EncoderConfig,
    EvalConfig,
    LMModelConfig,
    OracleModelConfig,
    QuantizerConfig,
)
from uvim_fsq.direct.model import DirectModel
from uvim_fsq.inference.code_decoding import LMDecoder
from uvim_fsq.inference.compiled import CapturedPrediction
from uvim_fsq.inference.one_graph import DirectGraph, LMGraph, PredictionGraph
from uvim_fsq.lm import captured as lm_captured
from uvim_fsq.lm import kv_cache, masked_generator, token_generator
from uvim_fsq.lm.autoregressive import AutoregressiveLM
from uvim_fsq.lm.image_encoder import build_image_encoder
from uvim_fsq.lm.masked import MaskedLM
from uvim_fsq.lm.masked_generator import MaskedGenerator
from uvim_fsq.lm.sampling import Sampling
from uvim_fsq.lm.token_generator import GREEDY, TokenGenerator
from uvim_fsq.oracle import chunking
from uvim_fsq.oracle.model import Oracle
from uvim_fsq.oracle.quantizers.vq import VQ


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTensorMode]:
    """Inside, `Tensor.to(CUDA)` works everywhere and autocast accepts the device."""
    allow_cuda_autocast(monkeypatch)
    with FakeTensorMode() as mode:
        yield mode


def real_models(task: str, kind: Any = "fsq", context: Any = "both") -> tuple[Oracle, AutoregressiveLM]:
    torch.manual_seed(0)
    quantizer = QuantizerConfig(kind=kind, levels=(5, 5), codebook_size=25, codeword_dim=8, commitment=0.1)
    config = OracleModelConfig(4, 16, 1, 1, 2, 32, context, 4, "none", quantizer=quantizer)
    encoder = EncoderConfig("vit_tiny_patch16_224", patch_size=4, width=16, depth=1, num_heads=2, mlp_dim=32)
    lm = AutoregressiveLM(LMModelConfig(encoder, 16, 1, 2, 32), image_size=16, vocab_size=25, length=4)
    return Oracle(config, TASKS[task].label_channels, 16), lm


def batch_on_cuda(task: str, mode: FakeTensorMode) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    with torch._subclasses.fake_tensor.unset_fake_temporarily():
        labels, image = random_batch(TASKS[task], 3)
    return {name: mode.from_tensor(x).to(CUDA) for name, x in labels.items()}, mode.from_tensor(image).to(CUDA)


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    ("kind", "context", "chunked"), [("fsq", "both", False), ("vq", "none", False), ("fsq", "none", True)]
)
def test_tensors_of_a_training_step_are_on_the_gpu_and_losses_are_float32(
    task: str, kind: Any, context: Any, chunked: bool, fake: FakeTensorMode, monkeypatch: Any
) -> None:
    with torch._subclasses.fake_tensor.unset_fake_temporarily():
        oracle, lm = real_models(task, kind, context)
    oracle, lm = on_cuda(oracle).train(), on_cuda(lm).train()
    if chunked:
        monkeypatch.setattr(chunking, "MAX_LOGITS", oracle.label_head.logits * 10)
    labels, image = batch_on_cuda(task, fake)
    with torch.autocast("cuda", torch.bfloat16):
        out = oracle(labels, image, TASKS[task].loss)
        if isinstance(oracle.quantizer, VQ):
            oracle.quantizer.accumulate(out.bottleneck, out.tokens)
        tokens = oracle.tokenize(labels, image)
        logits, (loss, logs) = lm.logits(image, tokens), lm(image, tokens)
    assert logits.dtype == torch.bfloat16  # else autocast was off
    for x in (out.loss, *out.logs.values(), loss, *logs.values()):
        assert (x.device, x.dtype) == (CUDA, torch.float32)


class OnlyOnTheGPU(TorchDispatchMode):
    """Refuses operators that read a tensor of the host, which a captured graph could not copy again."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        read = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        assert all(x.device == CUDA for x in read), f"{func} reads a tensor of the host"
        return func(*args, **(kwargs or {}))


def what_is_captured(monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[int, ...]]]:
    """Returns the list to which the shapes of each captured function's inputs will be added."""
    captured: list[list[tuple[int, ...]]] = []

    def capture(function: Any, inputs: Any, device: torch.device) -> Any:
        assert device == CUDA
        captured.append([tuple(x.shape) for x in inputs])

        def replay(inputs: Any) -> Any:
            with OnlyOnTheGPU():
                return function(inputs)

        return replay

    monkeypatch.setattr(lm_captured, "captured", capture)
    return captured


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(
    "sampling",
    [GREEDY, *(pytest.param(x, marks=pytest.mark.slow) for x in (Sampling(0.8, top_k=5), Sampling(1.0, top_p=0.9)))],
)
def test_generated_tokens_are_on_the_gpu_and_all_of_it_is_captured(
    precision: str, int8: bool, sampling: Sampling, fake: FakeTensorMode, monkeypatch: Any
) -> None:
    with torch._subclasses.fake_tensor.unset_fake_temporarily():
        lm = real_models("depth")[1]
        lm = token_generator.with_bf16_weights(lm) if precision == "bf16" else lm
    monkeypatch.setattr(token_generator, "with_bf16_weights", lambda model: model)
    monkeypatch.setattr(
        token_generator, "example_uniforms", lambda seeds, length: torch.zeros(len(seeds), length).double()
    )
    captured = what_is_captured(monkeypatch)
    monkeypatch.setattr(kv_cache, "_COMPILED", {"to_int8": kv_cache.to_int8, "attend_int8": kv_cache.attend_int8})
    generator = TokenGenerator(on_cuda(lm).eval(), sampling, precision=precision, int8=int8)
    image = batch_on_cuda("depth", fake)[1]
    image = image.repeat(4, 1, 1, 1)
    # 7 and 3 are padded to 9, 1 is too few to be, and 12 replaces 9.
    for count, sizes in ((9, [9]), (7, [9]), (3, [9]), (1, [9, 1]), (12, [1, 12]), (5, [1, 12])):
        tokens = generator(image[:count]).tokens
        assert (tokens.device, tokens.dtype, tuple(tokens.shape)) == (CUDA, torch.int64, (count, 4))
        assert [size for size, *_ in generator.graphs.graphs] == sizes
    random = sampling is not GREEDY
    assert captured == [[(size, 3, 16, 16), *[(size, 4)] * random] for size in (9, 1, 12)]


@pytest.mark.parametrize("kind", ["autoregressive", "masked", "direct"])
@pytest.mark.parametrize("task", TASKS)
def test_a_whole_prediction_is_captured(
    task: str, kind: str, fake: FakeTensorMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing in it reads a value or a tensor of the host."""
    with torch._subclasses.fake_tensor.unset_fake_temporarily():
        oracle, lm = real_models(task)
        if kind == "masked":
            lm = MaskedLM(lm.config, image_size=16, vocab_size=25, length=4)
        direct = DirectModel(DirectModelConfig(lm.config.encoder, 4, 16, 1, 2, 32), TASKS[task].label_channels, 16)
    evaluation = EvalConfig(codes="soft", context_weight=0.3, code_scale=0.9)
    graph: PredictionGraph = (
        DirectGraph(on_cuda(direct).eval(), evaluation)
        if kind == "direct"
        else LMGraph(LMDecoder(on_cuda(lm).eval(), on_cuda(oracle).eval(), TASKS[task], evaluation))
    )
    captured, shapes = what_is_captured(monkeypatch), []
    monkeypatch.setattr(TASKS[task], "decode", lambda logits: shapes.append([tuple(x.shape) for x in logits.values()]))
    decode = CapturedPrediction(lambda image, seeds: pytest.fail("the plain path"), graph, TASKS[task])
    _, tokens = decode(batch_on_cuda(task, fake)[1], torch.arange(3))
    assert captured == [[(3, 3, 16, 16)]]
    assert [shape[:3] for shape in shapes[0]] == [(3, 16, 16)] * len(TASKS[task].label_channels)
    if kind == "direct":
        assert tokens is None
    else:
        assert tokens is not None and (tokens.device, tuple(tokens.shape)) == (CUDA, (3, 4))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "vit_small_patch14_dinov2", "convnext_atto", "swin_tiny"])
def test_image_encoders_of_other_families_can_be_captured(name: str, fake: FakeTensorMode) -> None:
    name = {"swin_tiny": "swin_tiny_patch4_window7_224"}.get(name, name)
    with torch._subclasses.fake_tensor.unset_fake_temporarily():
        encoder = build_image_encoder(EncoderConfig(name), 224)
    for part in encoder.modules():  # buffers and what some models keep as plain attributes
        for key, value in list(vars(part).items()):
            if isinstance(value, torch.Tensor):
                setattr(part, key, torch.empty(value.shape, dtype=value.dtype, device=CUDA))
    encoder = on_cuda(encoder).eval()
    image = torch.empty(2, 3, 224, 224, dtype=torch.uint8, device=CUDA)
    with torch.inference_mode():
        expected = encoder(image)  # what is made once is made before a capture
        with OnlyOnTheGPU():
            found = encoder(image)
    assert (found.device, found.shape) == (CUDA, expected.shape)


def masked_model() -> MaskedLM:
    """A masked model with the sizes of `real_models`."""
    with torch._subclasses.fake_tensor.unset_fake_temporarily():
        return MaskedLM(real_models("depth")[1].config, image_size=16, vocab_size=25, length=4)


def test_tensors_of_a_masked_training_step_are_on_the_gpu(fake: FakeTensorMode) -> None:
    lm, image = on_cuda(masked_model()).train(), batch_on_cuda("depth", fake)[1]
    tokens = torch.zeros(3, 4, dtype=torch.long, device=CUDA)

    def code_loss(probabilities: torch.Tensor, features: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        assert (probabilities.device, probabilities.dtype, features.device) == (CUDA, torch.float32, CUDA)
        return probabilities.sum((1, 2)), {}

    with torch.autocast("cuda", torch.bfloat16):
        loss, logs = lm(image, tokens, code_loss)
        costs = lm.log_prob(image, tokens)
    for x in (loss, *logs.values(), costs):
        assert (x.device, x.dtype) == (CUDA, torch.float32)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.8, top_k=5, steps=3, choice_temperature=1.0)], ids=str)
def test_tokens_of_a_masked_model_are_on_the_gpu(
    precision: str, sampling: Sampling, fake: FakeTensorMode, monkeypatch: Any
) -> None:
    with torch._subclasses.fake_tensor.unset_fake_temporarily():
        lm = masked_generator.with_bf16_weights(masked_model()) if precision == "bf16" else masked_model()
    monkeypatch.setattr(masked_generator, "with_bf16_weights", lambda model: model)
    monkeypatch.setattr(
        masked_generator, "example_uniforms", lambda seeds, length: torch.zeros(len(seeds), length).double()
    )
    captured = what_is_captured(monkeypatch)
    generator = MaskedGenerator(on_cuda(lm).eval(), sampling, precision=precision, probabilities=True)
    found = generator(batch_on_cuda("depth", fake)[1])
    assert found.probabilities is not None and found.features is not None
    assert (found.tokens.device, found.tokens.dtype, tuple(found.tokens.shape)) == (CUDA, torch.int64, (3, 4))
    assert (found.probabilities.device, found.probabilities.dtype) == (CUDA, torch.float32)
    assert captured == [[(3, 3, 16, 16), *[(3, 3, 2, 4)] * (sampling is not GREEDY and sampling.is_random)]]


def test_mixed_devices_and_values_that_are_read_raise_errors() -> None:
    x = torch.ones(3, device=CUDA)
    with pytest.raises(RuntimeError, match="cuda:0, cpu"):
        x + torch.ones(3)
    with pytest.raises(DataDependentOutputException):
        x.sum().item()
