"""A baseline for the training step of either stage: the same computation in straightforward PyTorch.

It uses stock layers, one-hot labels and stored logits, and has no logging and no options. Its sizes come from a run's
configuration.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from uvim_fsq.config.rules import resolve_levels
from uvim_fsq.config.schema import LMRun, OracleModelConfig, OracleRun
from uvim_fsq.data.sample import Batch
from uvim_fsq.layers import patchify, position_embedding, resize_tokens
from uvim_fsq.lm.image_encoder import build_image_encoder
from uvim_fsq.oracle.model import Oracle, drop_codes
from uvim_fsq.oracle.quantizers.fsq import EPS
from uvim_fsq.tasks.base import Categorical, Task


def encoder(dim: int, depth: int, heads: int, mlp: int, activation: Any) -> nn.Sequential:
    """Pre-norm transformer blocks and a final LayerNorm."""
    block = partial(nn.TransformerEncoderLayer, dropout=0.0, layer_norm_eps=1e-6, batch_first=True, norm_first=True)
    blocks = [block(dim, heads, mlp, activation=activation) for _ in range(depth)]
    return nn.Sequential(*blocks, nn.LayerNorm(dim, eps=1e-6))


class BaselineOracle(nn.Module):
    """Stage I with FSQ as published (arXiv 2309.15505)."""

    def __init__(self, config: OracleModelConfig, task: Task, image_size: int) -> None:
        super().__init__()
        self.config, self.task, self.channels = config, task, task.label_channels
        dim, p = config.width, config.patch_size
        sizes = {k: c.num_classes if isinstance(c, Categorical) else c.channels for k, c in self.channels.items()}
        self.embed = nn.ModuleDict({name: nn.Linear(p * p * size, dim) for name, size in sizes.items()})
        self.heads = nn.ModuleDict({name: nn.Linear(dim, p * p * size) for name, size in sizes.items()})
        sides = [side for side in ("encoder", "decoder") if config.context in ("both", side)]
        self.context = nn.ModuleDict({side: nn.Conv2d(3, dim, p, p) for side in sides})
        self.positions = nn.ParameterList([position_embedding((image_size // p) ** 2, dim) for _ in range(2)])
        self.encoder = encoder(dim, config.encoder_depth, config.num_heads, config.mlp_dim, nn.GELU("tanh"))
        self.decoder = encoder(dim, config.decoder_depth, config.num_heads, config.mlp_dim, nn.GELU("tanh"))
        self.levels = nn.Buffer(torch.tensor(resolve_levels(config.quantizer.levels), dtype=torch.float32))
        self.code_in, self.code_out = nn.Linear(dim, len(self.levels)), nn.Linear(len(self.levels), dim)

    def quantize(self, z: torch.Tensor) -> torch.Tensor:
        half, offset = (self.levels - 1) * (1 - EPS) / 2, (1 - self.levels % 2) / 2
        z = torch.tanh(z.float() + torch.tan(offset / half)) * half - offset
        return (z + (z.round() - z).detach()) / (self.levels // 2)

    def forward(self, labels: dict[str, torch.Tensor], image: torch.Tensor) -> torch.Tensor:
        image = image.float() if image.is_floating_point() else image.float() / 127.5 - 1
        context = {side: project(image).flatten(2).transpose(1, 2) for side, project in self.context.items()}
        patches = {name: patchify(y, self.config.patch_size) for name, y in labels.items()}
        x = self.positions[0] + context.get("encoder", 0)
        for name, channel in self.channels.items():
            y = patches[name]
            if isinstance(channel, Categorical):
                y = (y.unsqueeze(-1) == torch.arange(channel.num_classes, device=y.device)).float()
            x = x + self.embed[name](y.flatten(2))
        z = self.code_in(resize_tokens(self.encoder(x), self.config.code_length))
        codes = self.code_out(drop_codes(self.quantize(z), self.config.code_dropout))
        x = self.decoder(resize_tokens(codes, x.shape[1]) + context.get("decoder", 0) + self.positions[1])
        return torch.stack([self.loss(name, self.heads[name](x).float(), y) for name, y in patches.items()]).sum()

    def loss(self, name: str, logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if not isinstance(self.channels[name], Categorical):
            return F.mse_loss(logits.view(y.shape), y)
        logits, y = logits.view(*y.shape, -1), y.long().flatten()
        if getattr(self.task.config, "missing", "") == "bin0":
            y = y.masked_fill(y == 0, -1)
        return F.cross_entropy(logits.flatten(0, 2), y, ignore_index=-1, reduction="sum") / y.numel()


class BaselineBlock(nn.Module):
    """One block of the token decoder."""

    def __init__(self, dim: int, heads: int, mlp: int, memory: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(dim, eps=1e-6) for _ in range(3)])
        self.self_attention = nn.MultiheadAttention(dim, heads, bias=False, batch_first=True)
        self.cross_attention = nn.MultiheadAttention(dim, heads, bias=False, batch_first=True, kdim=memory, vdim=memory)
        self.mlp = nn.Sequential(nn.Linear(dim, mlp), nn.GELU("tanh"), nn.Linear(mlp, dim))

    def forward(self, x: torch.Tensor, memory: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        y = self.norms[0](x)
        x = x + self.self_attention(y, y, y, attn_mask=mask, is_causal=True, need_weights=False)[0]
        x = x + self.cross_attention(self.norms[1](x), memory, memory, need_weights=False)[0]
        return x + self.mlp(self.norms[2](x))


class BaselineLM(nn.Module):
    """Stage II without dropout. The encoder has the sizes of the timm model `vit` and random weights."""

    def __init__(self, run: LMRun, vocab: int, length: int, vit: Any) -> None:
        super().__init__()
        config, size, block = run.model, vit.embed_dim, vit.blocks[0]
        self.patch = nn.Conv2d(3, size, vit.patch_embed.patch_size, vit.patch_embed.patch_size)
        self.positions = nn.Parameter(torch.randn(vit.pos_embed.shape) * 0.02)
        attention, mlp = block.attn.num_heads, block.mlp
        self.encoder = encoder(size, len(vit.blocks), attention, mlp.fc1.out_features, mlp.act)
        self.embed, self.start = nn.Embedding(vocab, config.width), nn.Parameter(torch.randn(1, 1, config.width))
        self.token_positions = position_embedding(length, config.width)
        block = partial(BaselineBlock, config.width, config.num_heads, config.mlp_dim, size)
        self.blocks = nn.ModuleList([block() for _ in range(config.depth)])
        self.norm, self.head = nn.LayerNorm(config.width, eps=1e-6), nn.Linear(config.width, vocab)

    def forward(self, image: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        image = (image.float() / 255 - 0.5) / 0.5 if not image.is_floating_point() else image
        memory = self.encoder(self.patch(image).flatten(2).transpose(1, 2) + self.positions)
        x = torch.cat([self.start.expand(len(tokens), -1, -1), self.embed(tokens)[:, :-1]], 1) + self.token_positions
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device)
        for block in self.blocks:
            x = block(x, memory, mask)
        return F.cross_entropy(self.head(self.norm(x)).float().flatten(0, 1), tokens.flatten())


def baseline_model(run: OracleRun | LMRun, task: Task, oracle: Oracle | None) -> BaselineOracle | BaselineLM:
    """An untrained baseline model with the sizes of a resolved run. Stage II needs the oracle for its vocabulary size
    and code length.
    """
    if isinstance(run, OracleRun):
        return BaselineOracle(run.model, task, run.data.image_size)
    assert oracle is not None
    vit = build_image_encoder(run.model.encoder, run.data.image_size).model
    return BaselineLM(run, oracle.quantizer.codebook_size, oracle.code_length, vit)


def baseline_step(
    run: OracleRun | LMRun, task: Task, oracle: Oracle | None, batch: Batch, device: torch.device
) -> Callable[[], torch.Tensor]:
    """A function that makes a training step on `batch` and returns the loss.

    A step is tokenization by `oracle` (stage II only), forward and backward pass, clipping and AdamW.
    """
    model = baseline_model(run, task, oracle).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), run.optim.lr, betas=run.optim.betas, fused=True)
    labels, image = {name: x.to(device) for name, x in batch["labels"].items()}, batch["image"].to(device)

    def step() -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=run.train.precision == "bf16"):
            with torch.no_grad():
                arguments = (labels, image) if oracle is None else (image, oracle.tokenize(labels, image))
            loss = model(*arguments)
        loss.backward()
        if run.optim.clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), run.optim.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step
