"""Computed costs, against numbers derived for the paper's sizes (512 x 512; H200: 788 TFLOP/s, 4.3 TB/s)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.support.token_models import make_images, make_masked_lm
from uvim_fsq.config.schema import LMModelConfig, OracleModelConfig
from uvim_fsq.lm.autoregressive import AutoregressiveLM
from uvim_fsq.lm.masked import MaskedLM
from uvim_fsq.lm.sampling import Sampling
from uvim_fsq.oracle.model import Oracle
from uvim_fsq.performance.device_peak import DevicePeak
from uvim_fsq.performance.flops import OracleCost
from uvim_fsq.tasks.base import Categorical, LabelChannel, Real

H200 = DevicePeak("H200", "bf16", 788e12, 4.3e12)


TASKS: dict[str, dict[str, LabelChannel]] = {
    "panoptic": {"semantics": Categorical(134), "instances": Categorical(100)},
    "depth": {"depth": Categorical(256)},
    "color": {"color": Real(3)},
}


def oracle_cost(task: str, context: Any = "both") -> OracleCost:
    with torch.device("meta"):
        return Oracle(OracleModelConfig(context=context), TASKS[task], 512).cost()


@pytest.fixture(scope="module")
def masked() -> MaskedLM:
    with torch.device("meta"):
        return MaskedLM(LMModelConfig(kind="masked"), image_size=512, vocab_size=4375, length=256)


@pytest.fixture(scope="module")
def lm() -> AutoregressiveLM:
    with torch.device("meta"):
        return AutoregressiveLM(LMModelConfig(), image_size=512, vocab_size=4375, length=256)


@pytest.mark.parametrize(
    ("task", "gigaflop", "images"), [("panoptic", 1433, 550), ("depth", 1477, 534), ("color", 968, 814)]
)
def test_flop_of_training_an_oracle(task: str, gigaflop: float, images: float) -> None:
    train = oracle_cost(task).train
    assert train / 1e9 == pytest.approx(gigaflop, abs=1)
    assert H200.flops / train == pytest.approx(images, abs=1)


@pytest.mark.parametrize(
    ("task", "tokenize", "gigaflop", "images"),
    [("panoptic", 202, 3314, 238), ("depth", 211, 3323, 237), ("color", 109, 3221, 245)],
)
def test_flop_of_training_the_lm(
    lm: AutoregressiveLM, task: str, tokenize: float, gigaflop: float, images: float
) -> None:
    oracle = oracle_cost(task).tokenize
    train = lm.cost().train + oracle
    assert oracle / 1e9 == pytest.approx(tokenize, abs=1)
    assert train / 1e9 == pytest.approx(gigaflop, abs=2)
    assert H200.flops / train == pytest.approx(images, abs=1)


def test_bytes_that_a_decoding_step_reads(lm: AutoregressiveLM) -> None:
    cost = lm.cost()
    assert 2 * cost.step_weights / 1e6 == pytest.approx(713, abs=1)
    assert 2 * cost.cross_numbers / 1e6 == pytest.approx(100.7, abs=0.1)
    assert 2 * cost.self_numbers / 1e3 == pytest.approx(98.3, abs=0.1)
    weights = [p for name, p in lm.blocks.named_parameters() if p.ndim == 2 and "cross_attn" not in name]
    crossed = [p for name, p in lm.blocks.named_parameters() if "cross_attn.query" in name or "cross_attn.out" in name]
    assert cost.step_weights == sum(p.numel() for p in [*weights, *crossed, lm.head.weight])


@pytest.mark.parametrize(
    ("batch", "cross_bytes", "images"),
    [(1, 2, 20), (16, 2, 96), (64, 2, 118), (256, 2, 126), (64, 1, 183), (256, 1, 202)],
)
def test_least_time_of_decoding(lm: AutoregressiveLM, batch: int, cross_bytes: float, images: float) -> None:
    seconds = lm.cost().generate_seconds(batch, H200, number_bytes=2, cross_bytes=cross_bytes)
    assert batch / seconds == pytest.approx(images, abs=1)


def test_a_masked_model_adds_the_other_half_of_the_scores(lm: AutoregressiveLM, masked: MaskedLM) -> None:
    half = 24 * 2 * 256 * 256 * 1024
    assert masked.cost().train - lm.cost().train == pytest.approx(3 * half)
    assert masked.cost(8).train == masked.cost().train
    assert masked.cost().step_weights == lm.cost().step_weights


def test_bytes_that_masked_decoding_reads(masked: MaskedLM) -> None:
    """Per step the weights, and the cross-attention's keys and values of each image."""
    for steps in (1, 4):
        read = masked.cost(steps).generate_bytes(16, number_bytes=2, cross_bytes=2)
        assert read / 1e6 == pytest.approx(steps * (713 + 16 * 100.7), rel=0.001)


@pytest.mark.parametrize(("steps", "batch", "images"), [(1, 1, 757), (1, 64, 757), (4, 64, 468), (8, 256, 310)])
def test_least_time_of_masked_decoding(masked: MaskedLM, steps: int, batch: int, images: float) -> None:
    """826.3 GFLOP for the encoder and the cross-attention's keys and values, 212.6 for a step, 2.3 for all logits."""
    seconds = masked.cost(steps).generate_seconds(batch, H200, number_bytes=2, cross_bytes=2)
    assert batch / seconds == pytest.approx(images, abs=1)


def test_counted_flop_of_masked_decoding_equal_those_of_torchs_counter(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    # The counter does not know the kernel that torch uses on a CPU.
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **_: object) -> torch.Tensor:
        return (q @ k.transpose(2, 3)).softmax(-1) @ v

    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    lm, images = make_masked_lm(), make_images(2)
    for steps in (1, 4):
        with FlopCounterMode(display=False) as counter:
            lm.generate(images, Sampling(steps=steps))
        cost = lm.cost(steps)
        counted = cost.encode + sum(cost.step_flop(count) for count in cost.predicted)
        assert counter.get_total_flops() == 2 * counted


def test_context_that_is_not_used_is_not_counted() -> None:
    both, none = oracle_cost("color"), oracle_cost("color", context="none")
    assert both.forward - none.forward == pytest.approx(2 * both.context)
    assert both.train - none.train == pytest.approx(4 * both.context)
    assert both.tokenize - none.tokenize == pytest.approx(both.context)


def test_counted_flop_of_layers_equal_those_of_torchs_counter() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    from uvim_fsq.lm.autoregressive import DecoderBlock
    from uvim_fsq.oracle.backbones.transformer import EncoderBlock
    from uvim_fsq.performance.flops import decoder_layer, encoder_layer

    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        EncoderBlock(48, 4, 96)(torch.empty(1, 20, 48))
    assert counter.get_total_flops() == encoder_layer(48, 96, 20)
    config = LMModelConfig(width=48, num_heads=4, mlp_dim=96, depth=1)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        DecoderBlock(config, 32)(torch.empty(1, 8, 48), torch.empty(1, 20, 32))
    causal = 2 * 8 * 8 * 48  # torch counts the masked half of the scores, too
    assert counter.get_total_flops() == decoder_layer(48, 96, 32, 8, 20) + causal
    assert counter.get_total_flops() == decoder_layer(48, 96, 32, 8, 20, causal=False)
