"""Published stage-I arrays (UViM's names and layouts) -> the state dict of our Oracle, its quantizer apart.

Theirs: dense kernels (in, out), attention kernels (width, heads, head_dim), convolutions HWIO, label embeddings
(classes, pixels, width), heads (width, classes, pixels). Ours: (out, in), label tables and heads pixel-major.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch


def _dense(p: Mapping[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    return {"weight": p[f"{name}/kernel"].T, "bias": p[f"{name}/bias"]}


def _norm(p: Mapping[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    return {"weight": p[f"{name}/scale"], "bias": p[f"{name}/bias"]}


def _block(p: Mapping[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    attention = f"{name}/MultiHeadDotProductAttention_0"
    parts = {"norm1": _norm(p, f"{name}/LayerNorm_0"), "norm2": _norm(p, f"{name}/LayerNorm_1")}
    for part in ("query", "key", "value"):
        kernel = p[f"{attention}/{part}/kernel"]
        parts[f"attn.{part}"] = {
            "weight": kernel.reshape(len(kernel), -1).T,
            "bias": p[f"{attention}/{part}/bias"].ravel(),
        }
    kernel = p[f"{attention}/out/kernel"]
    parts["attn.out"] = {"weight": kernel.reshape(-1, kernel.shape[-1]).T, "bias": p[f"{attention}/out/bias"]}
    parts["mlp.fc1"] = _dense(p, f"{name}/MlpBlock_0/Dense_0")
    parts["mlp.fc2"] = _dense(p, f"{name}/MlpBlock_0/Dense_1")
    return {f"{part}.{key}": value for part, values in parts.items() for key, value in values.items()}


def _transformer(p: Mapping[str, np.ndarray], theirs: str, depth: int) -> dict[str, np.ndarray]:
    state = {f"norm.{key}": value for key, value in _norm(p, f"{theirs}/encoder_norm").items()}
    for i in range(depth):
        state |= {f"blocks.{i}.{key}": value for key, value in _block(p, f"{theirs}/encoderblock_{i}").items()}
    return state


def oracle_state(
    arrays: Mapping[str, np.ndarray], channel: str, *, real: bool, encoder_depth: int, decoder_depth: int
) -> dict[str, torch.Tensor]:
    """The state dict for a one-channel oracle from arrays named `params/...`."""
    p = {
        name.removeprefix("params/"): np.asarray(value) for name, value in arrays.items() if name.startswith("params/")
    }
    state: dict[str, np.ndarray] = {}
    for ours, theirs in (("encoder_context", "ctx_enc_embedding"), ("decoder_context", "ctx_dec_embedding")):
        if f"{theirs}/kernel" in p:
            kernel = p[f"{theirs}/kernel"]
            state[f"{ours}.proj.weight"] = kernel.reshape(-1, kernel.shape[-1]).T
            state[f"{ours}.proj.bias"] = p[f"{theirs}/bias"]
    embedding = p[f"embedding_{channel}/kernel"].transpose(1, 0, 2)  # pixel, class, width
    flat = embedding.reshape(-1, embedding.shape[-1])
    key = "proj.weight" if real else "weight"
    state[f"label_embed.channels.{channel}.{key}"] = flat.T if real else flat
    state[f"label_embed.channels.{channel}.{'proj.bias' if real else 'bias'}"] = p[f"embedding_{channel}/bias"]
    head = p[f"head_{channel}/kernel"].transpose(2, 1, 0)  # pixel, class, width
    state[f"label_head.heads.{channel}.weight"] = head.reshape(-1, head.shape[-1])
    state[f"label_head.heads.{channel}.bias"] = p[f"head_{channel}/bias"].T.reshape(-1)
    for name, depth in (("encoder", encoder_depth), ("decoder", decoder_depth)):
        state |= {f"{name}.{key}": value for key, value in _transformer(p, name, depth).items()}
        state[f"{name}_positions"] = p[f"pos_embedding_{name}"]
    for name in ("encoder_head", "decoder_stem"):
        state |= {f"{name}.{key}": value for key, value in _dense(p, name).items()}
    return {name: torch.tensor(np.ascontiguousarray(value), dtype=torch.float32) for name, value in state.items()}
