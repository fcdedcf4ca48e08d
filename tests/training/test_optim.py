""""""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.support.runs import fit_run, losses
from tests.support.small import ORACLE, TASKS, oracle_run
from uvim_fsq.checkpoints.loading import LoadedRun, build_oracle
from uvim_fsq.config.schema import EncoderConfig, OptimConfig, OracleRun
from uvim_fsq.errors import UserError
from uvim_fsq.lm.image_encoder import ImageEncoder, build_image_encoder
from uvim_fsq.tasks.configuration import load_run
from uvim_fsq.training.adafactor import Adafactor
from uvim_fsq.training.optim import (
    build_optimizer,
    decays,
    learning_rate,
    load_optimizers,
    parameter_groups,
    schedule,
    set_rates,
)

OPTIM = OptimConfig(lr=2e-3, weight_decay=0.5, warmup_steps=4, final_lr_ratio=0.1, encoder_lr_ratio=0.25)


KERNELS = ("encoder.model.0.weight", "encoder.projection.weight", "start_normals.weight")


class Encoder(ImageEncoder):
    """An image encoder with a model of two layers and a projection of its own."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.config, self.model = EncoderConfig(), nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
        self.projection = nn.Linear(3, 3, bias=False)


class Model(nn.Module):
    """Named as an LM: kernels, biases, a norm, positions, a table and a start vector."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.token_embedding = nn.Embedding(5, 3)
        self.positions = nn.Parameter(torch.ones(1, 4, 3))
        self.start = nn.Parameter(torch.ones(1, 1, 3))
        self.start_normals = nn.Linear(3, 2)
        self.frozen = nn.Linear(3, 2).requires_grad_(False)


def test_the_schedule_warms_up_linearly_and_decays_by_a_cosine() -> None:
    found = [schedule(step, 12, OPTIM) for step in range(14)]
    assert found[:5] == [0, 0.25, 0.5, 0.75, 1]
    assert found[8] == pytest.approx(0.55) and found[6] == pytest.approx(0.1 + 0.9 * (0.5 + 0.5**1.5))
    assert found[12] == found[13] == pytest.approx(0.1)
    assert learning_rate(2, 12, OPTIM) == 1e-3
    assert schedule(0, 12, replace(OPTIM, warmup_steps=0)) == 1
    short = replace(OPTIM, warmup_steps=3)
    assert schedule(3, 4, short) == 1 and schedule(4, 4, short) == pytest.approx(0.1)


def test_only_kernels_decay() -> None:
    """Norms, tables and positions do not, as in the reference."""
    found = {name for name, p in Model().named_parameters() if decays(name, p)}
    assert found == {*KERNELS, "frozen.weight"}


def test_parameter_groups_have_their_decay_and_rate() -> None:
    """The model of an image encoder is slower, but not its projection."""
    model = Model()
    names = {p: name for name, p in model.named_parameters()}
    found = {
        names[p]: (group["weight_decay"], group["lr_ratio"])
        for group in parameter_groups(model, OPTIM)
        for p in group["params"]
    }
    assert found == {
        "encoder.model.0.weight": (0.5, 0.25),
        **dict.fromkeys(("encoder.model.0.bias", "encoder.model.1.weight", "encoder.model.1.bias"), (0.0, 0.25)),
        "encoder.projection.weight": (0.5, 1.0),
        "start_normals.weight": (0.5, 1.0),
        **dict.fromkeys(("token_embedding.weight", "positions", "start", "start_normals.bias"), (0.0, 1.0)),
    }


@pytest.mark.parametrize("name", ["adafactor", "adamw"])
def test_updates_follow_rate_and_decay_from_the_first_step(name: str) -> None:
    """The first has rate 0, the second the first share of the warm-up; the decay of adamw is times the rate."""
    model = Model()
    optim = replace(OPTIM, name=name)
    optimizer = build_optimizer(model, optim)
    assert isinstance(optimizer, Adafactor if name == "adafactor" else torch.optim.AdamW)
    assert name == "adafactor" or optimizer.defaults["fused"]
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for step in range(2):
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
        for p in model.parameters():
            p.grad = torch.ones_like(p) if p.requires_grad else None
        set_rates(optimizer, optim.lr, schedule(step, 12, optim))
        optimizer.step()
    # The normalized update of a constant gradient is 1; Adafactor's momentum has no bias correction.
    moved = 1.0 if name == "adamw" else 0.19
    share = 0.25 if name == "adafactor" else 0.25 * 2e-3
    for n, p in model.named_parameters():
        rate = 0.0 if n.startswith("frozen") else 0.25 * 2e-3 * (0.25 if n.startswith("encoder.model.") else 1.0)
        factor = share * (0.25 if name == "adamw" and n.startswith("encoder.model.") else 1.0)
        decay = 0.5 * factor if n in KERNELS else 0.0
        torch.testing.assert_close(p.detach(), before[n] * (1 - decay) - rate * moved, rtol=1e-4, atol=1e-6)


def vit_rates(name: str, **optim: float) -> dict[str, float]:
    """Parameter of an image encoder -> its rate in relation to the scheduled one."""
    encoder = build_image_encoder(EncoderConfig(name, out_width=8), 32)
    names = {p: name for name, p in encoder.named_parameters()}
    groups = parameter_groups(encoder, replace(OPTIM, **optim))
    return {names[p]: group["lr_ratio"] for group in groups for p in group["params"]}


def test_layers_further_down_in_an_image_encoder_learn_more_slowly() -> None:
    """The last block has the encoder's rate, and each layer below another factor. The projection has the full rate."""
    rates = vit_rates("test_vit", encoder_layer_decay=0.5)
    for block in range(6):
        expected = 0.25 * 0.5 ** (5 - block)
        assert {rate for name, rate in rates.items() if f"blocks.{block}." in name} == {expected}
    assert rates["model.norm.weight"] == 0.25
    assert rates["model.patch_embed.proj.weight"] == rates["model.pos_embed"] == 0.25 * 0.5**6
    assert rates["projection.weight"] == rates["projection.bias"] == 1


def test_register_tokens_learn_as_slowly_as_positions() -> None:
    rates = vit_rates("test_vit3", encoder_layer_decay=0.5)
    assert rates["model.reg_token"] == rates["model.pos_embed"] == min(rates.values())


def test_without_layer_wise_decay_an_encoder_has_one_rate() -> None:
    assert set(vit_rates("test_vit").values()) == {0.25, 1.0}


@pytest.mark.parametrize("name", ["adafactor", "adamw"])
def test_both_optimizers_follow_layer_wise_rates(name: str) -> None:
    """The first normalized update of a constant gradient is as large as the rate."""
    encoder = build_image_encoder(EncoderConfig("test_vit"), 32)
    optim = replace(OPTIM, name=name, encoder_layer_decay=0.5, weight_decay=0.0)
    optimizer = build_optimizer(encoder, optim)
    before = {n: p.detach().clone() for n, p in encoder.named_parameters()}
    for p in encoder.parameters():
        p.grad = torch.ones_like(p)
    set_rates(optimizer, optim.lr, 1.0)
    optimizer.step()
    moved = {n: (before[n] - p.detach()).mean().item() for n, p in encoder.named_parameters()}
    for block in range(5):
        low, high = (moved[f"model.blocks.{i}.mlp.fc1.weight"] for i in (block, block + 1))
        assert high > 0 and low / high == pytest.approx(0.5, rel=1e-2)


def test_frozen_parameters_are_in_no_group() -> None:
    encoder = build_image_encoder(EncoderConfig("test_vit", frozen=True, out_width=8), 32)
    (weight,), (bias,) = (group["params"] for group in parameter_groups(encoder, OPTIM))
    assert weight is encoder.projection.weight and bias is encoder.projection.bias


@pytest.mark.parametrize("name", ["adafactor", "adamw"])
def test_a_loaded_state_keeps_the_configured_rates_and_decay(name: str) -> None:
    model = Model()
    first = build_optimizer(model, replace(OPTIM, name=name))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    first.step()
    other = replace(OPTIM, name=name, weight_decay=0.25, encoder_lr_ratio=1.0, lr=1.0)
    second = build_optimizer(model, other)
    load_optimizers({"model": second}, {"model": first.state_dict()})
    assert {(group["weight_decay"], group["lr_ratio"]) for group in second.param_groups} == {(0.25, 1.0), (0.0, 1.0)}
    for p in (p for p in model.parameters() if p.requires_grad):
        assert second.state[p].keys() == first.state[p].keys()
        for key, value in first.state[p].items():
            assert torch.equal(torch.as_tensor(second.state[p][key]), torch.as_tensor(value))
    with pytest.raises(UserError, match="belongs to a different model"):
        load_optimizers({"model": build_optimizer(nn.Linear(2, 2), other)}, {"model": first.state_dict()})
    with pytest.raises(UserError, match="belongs to a different model"):
        load_optimizers({"model": second, "other": second}, {"model": first.state_dict()})


def test_a_warmup_that_is_as_long_as_the_run_is_refused(tmp_path: Path, data: Path) -> None:
    """24 images in batches of 8 are 3 steps per epoch."""
    keys = ["train.steps=null", "train.epochs=1.5", "train.log_every=1"]
    with pytest.raises(UserError, match=r"^optim.warmup_steps=4 must be below train.epochs=1.5, 4 steps$"):
        fit_run(oracle_run(tmp_path / "a", data, *keys, "optim.warmup_steps=4"))
    assert not (tmp_path / "a").exists()
    assert len(losses(fit_run(oracle_run(tmp_path / "b", data, *keys, "optim.warmup_steps=3")))) == 4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adafactor", "adamw"])
def test_both_optimizers_reduce_the_loss_in_bf16(tmp_path: Path, data: Path, name: str) -> None:
    curve = losses(fit_run(oracle_run(tmp_path / name, data, f"optim.name={name}", "train.precision=bf16")))
    assert np.isfinite(curve).all() and curve[-1] < curve[0]


def rates(model: nn.Module, **optim: float) -> dict[str, float]:
    names = {p: name for name, p in model.named_parameters()}
    groups = parameter_groups(model, replace(OPTIM, **optim))
    return {names[p]: group["lr_ratio"] for group in groups for p in group["params"]}


def test_layers_further_down_in_an_oracle_learn_more_slowly() -> None:
    """Encoder and decoder are counted through; what depends on the labels has the full rate."""
    run = load_run(ORACLE, ["model.encoder_depth=2", "model.decoder_depth=2"])
    assert isinstance(run, OracleRun)
    found = rates(build_oracle(run, TASKS["depth"]), layer_decay=0.5)
    order = ["encoder_positions", "encoder.blocks.0.mlp.fc1.weight", "encoder_head.weight", "decoder_stem.bias"]
    order += ["decoder.blocks.0.mlp.fc1.weight", "decoder.norm.weight"]
    assert [found[name] for name in order] == [0.5**5, 0.5**4, 0.5**3, 0.5**2, 0.5, 1.0]
    assert found["encoder_context.proj.weight"] == 0.5**5 and found["encoder.norm.bias"] == 0.5**3
    assert found["label_embed.channels.depth.weight"] == found["label_head.heads.depth.bias"] == 1.0


def test_layers_further_down_in_a_token_model_learn_more_slowly(random_lm: LoadedRun) -> None:
    """The image encoder keeps its own two settings."""
    assert random_lm.lm is not None
    found = rates(random_lm.lm, layer_decay=0.5)
    assert found["positions"] == 0.5 and found["blocks.0.mlp.fc1.weight"] == found["norm.bias"] == 1.0
    assert found["token_embedding.weight"] == found["head.weight"] == found["start"] == 1.0
    assert {rate for name, rate in found.items() if name.startswith("encoder.")} == {0.25}


def test_layers_of_unknown_order_have_no_layer_wise_rates() -> None:
    with pytest.raises(UserError, match=r"optim.layer_decay: Linear does not order its layers; use 1"):
        parameter_groups(nn.Linear(2, 2), replace(OPTIM, layer_decay=0.5))
