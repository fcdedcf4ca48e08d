"""The baseline has our number of parameters and, with our weights, our loss."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.support.small import TASKS, lm_run, oracle_run, random_batch
from uvim_fsq.benchmark.baseline import BaselineBlock, BaselineLM, BaselineOracle, baseline_model, baseline_step
from uvim_fsq.config.schema import LMRun, OracleModelConfig, QuantizerConfig
from uvim_fsq.data.sample import Batch
from uvim_fsq.layers import Attention
from uvim_fsq.lm.autoregressive import AutoregressiveLM
from uvim_fsq.oracle.backbones.transformer import Transformer
from uvim_fsq.oracle.label_embedding import RealEmbed
from uvim_fsq.oracle.model import Oracle
from uvim_fsq.training.stages import LMStage, build_stage


def copy(baseline: nn.Module, ours: nn.Module) -> None:
    """One module's parameters, in their order."""
    for theirs, mine in zip(baseline.parameters(), ours.parameters(), strict=True):
        theirs.copy_(mine.reshape(theirs.shape))


def copy_attention(baseline: nn.MultiheadAttention, ours: Attention) -> None:
    projections = (ours.query, ours.key, ours.value)
    baseline.in_proj_weight.copy_(torch.cat([x.weight for x in projections]))
    if baseline.in_proj_bias is not None:
        baseline.in_proj_bias.copy_(torch.cat([x.bias for x in projections]))
    copy(baseline.out_proj, ours.out)


def copy_encoder(baseline: nn.Sequential, blocks: nn.Module, norm: nn.Module) -> None:
    for theirs, mine in zip(list(baseline)[:-1], blocks.children(), strict=True):
        assert isinstance(theirs, nn.TransformerEncoderLayer)
        if isinstance(mine.attn, Attention):
            copy_attention(theirs.self_attn, mine.attn)
        else:
            copy(theirs.self_attn, mine.attn)
        for one, two in (("linear1", mine.mlp.fc1), ("linear2", mine.mlp.fc2), ("norm1", mine.norm1)):
            copy(getattr(theirs, one), two)
        copy(theirs.norm2, mine.norm2)
    copy(baseline[-1], norm)


@torch.no_grad()
def copy_oracle(baseline: BaselineOracle, ours: Oracle) -> None:
    for name, head in ours.label_head.heads.items():
        nn.init.normal_(head.weight)  # they start at zero
        copy(baseline.heads[name], head)
        embed = ours.label_embed.channels[name]
        if isinstance(embed, RealEmbed):
            copy(baseline.embed[name], embed)
        else:
            baseline.embed[name].weight.copy_(embed.weight.T)
            baseline.embed[name].bias.copy_(embed.bias)
    for side, theirs in (("encoder", baseline.encoder), ("decoder", baseline.decoder)):
        transformer = getattr(ours, side)
        assert isinstance(transformer, Transformer)
        copy_encoder(theirs, transformer.blocks, transformer.norm)
        context = getattr(ours, f"{side}_context")
        if context is not None:  # ours: (rows, columns, colors)
            p = ours.config.patch_size
            baseline.context[side].weight.copy_(context.proj.weight.view(-1, p, p, 3).permute(0, 3, 1, 2))
            baseline.context[side].bias.copy_(context.proj.bias)
    for theirs, mine in zip(baseline.positions, (ours.encoder_positions, ours.decoder_positions), strict=True):
        theirs.copy_(mine)
    copy(baseline.code_in, ours.encoder_head)
    copy(baseline.code_out, ours.decoder_stem)


@torch.no_grad()
def copy_lm(baseline: BaselineLM, ours: AutoregressiveLM) -> None:
    nn.init.normal_(ours.head.weight)
    for theirs, mine in (
        (baseline.patch, ours.encoder.model.patch_embed.proj),
        (baseline.embed, ours.token_embedding),
        (baseline.norm, ours.norm),
        (baseline.head, ours.head),
    ):
        copy(theirs, mine)
    for theirs, mine in ((baseline.positions, ours.encoder.model.pos_embed), (baseline.start, ours.start)):
        theirs.copy_(mine)
    baseline.token_positions.copy_(ours.positions)
    copy_encoder(baseline.encoder, ours.encoder.model.blocks, ours.encoder.model.norm)
    for theirs, mine in zip(baseline.blocks, ours.blocks, strict=True):
        assert isinstance(theirs, BaselineBlock)
        for one, two in zip(theirs.norms, (mine.norm1, mine.norm2, mine.norm3), strict=True):
            copy(one, two)
        copy_attention(theirs.self_attention, mine.self_attn)
        copy_attention(theirs.cross_attention, mine.cross_attn)
        copy(theirs.mlp, mine.mlp)


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("context", ["both", "none"])
@pytest.mark.parametrize("task", TASKS)
def test_the_baseline_oracle_has_our_loss(task: str, context: str) -> None:
    torch.manual_seed(0)
    config = OracleModelConfig(4, 16, 1, 2, 2, 32, context, 4, "none", QuantizerConfig(levels=(8, 5)))
    ours = Oracle(config, TASKS[task].label_channels, 16).train()
    baseline = BaselineOracle(config, TASKS[task], 16).train()
    assert count(baseline) == count(ours)
    copy_oracle(baseline, ours)
    labels, image = random_batch(TASKS[task], 3)
    out = ours(labels, image, TASKS[task].loss)
    torch.testing.assert_close(baseline(labels, image), out.loss.mean(), atol=1e-5, rtol=1e-5)


def test_the_baseline_lm_has_our_loss(tmp_path: Path, data: Path, oracle_dir: Path) -> None:
    labels, image = random_batch(TASKS["depth"], 8)
    run = lm_run(tmp_path, oracle_dir)
    stage = build_stage(run)
    assert isinstance(stage, LMStage) and isinstance(stage.model, AutoregressiveLM) and isinstance(run, LMRun)
    baseline = baseline_model(run, stage.task, stage.oracle)
    assert isinstance(baseline, BaselineLM) and count(baseline) == count(stage.model)
    copy_lm(baseline, stage.model)
    tokens = stage.oracle.tokenize(labels, image)
    expected = stage.model.loss(image, tokens)[0].mean()
    torch.testing.assert_close(baseline(image, tokens), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["oracle", "lm"])
def test_baseline_steps_reduce_the_loss(tmp_path: Path, data: Path, oracle_dir: Path, name: str) -> None:
    labels, image = random_batch(TASKS["depth"], 8)
    batch = Batch(image=image, labels=labels, index=torch.arange(8), id=[""] * 8)
    run = oracle_run(tmp_path, data) if name == "oracle" else lm_run(tmp_path, oracle_dir)
    stage = build_stage(run)
    oracle = stage.oracle if isinstance(stage, LMStage) else None
    step = baseline_step(run, stage.task, oracle, batch, torch.device("cpu"))
    first, *_, last = (float(step()) for _ in range(20))
    assert last < first
