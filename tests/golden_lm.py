"""Published stage-II arrays (UViM's names and layouts) -> the state dict of our LM.

Their index 0 is the start symbol inside the vocabulary; here the whole vocabulary is carried over and the start
vector is their embedding of 0, so that the numbers can be compared one to one.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

Arrays = Mapping[str, np.ndarray]


def _dense(p: Arrays, name: str) -> dict[str, np.ndarray]:
    return {"weight": p[f"{name}/kernel"].T, "bias": p[f"{name}/bias"]}


def _norm(p: Arrays, name: str) -> dict[str, np.ndarray]:
    return {"weight": p[f"{name}/scale"], "bias": p[f"{name}/bias"]}


def _into_heads(p: Arrays, name: str) -> np.ndarray:
    kernel = p[f"{name}/kernel"]
    return kernel.reshape(len(kernel), -1).T


def _out_of_heads(p: Arrays, name: str) -> np.ndarray:
    kernel = p[f"{name}/kernel"]
    return kernel.reshape(-1, kernel.shape[-1]).T


def _encoder_block(p: Arrays, name: str) -> dict[str, np.ndarray]:
    attention = f"{name}/MultiHeadDotProductAttention_0"
    parts = {
        "norm1": _norm(p, f"{name}/LayerNorm_0"),
        "norm2": _norm(p, f"{name}/LayerNorm_1"),
        "mlp.fc1": _dense(p, f"{name}/MlpBlock_0/Dense_0"),
        "mlp.fc2": _dense(p, f"{name}/MlpBlock_0/Dense_1"),
        "attn.proj": {"weight": _out_of_heads(p, f"{attention}/out"), "bias": p[f"{attention}/out/bias"]},
        "attn.qkv": {
            "weight": np.concatenate([_into_heads(p, f"{attention}/{part}") for part in ("query", "key", "value")]),
            "bias": np.concatenate([p[f"{attention}/{part}/bias"].ravel() for part in ("query", "key", "value")]),
        },
    }
    return {f"{part}.{key}": value for part, values in parts.items() for key, value in values.items()}


def _decoder_block(p: Arrays, name: str) -> dict[str, np.ndarray]:
    state: dict[str, np.ndarray] = {}
    for ours, theirs in (("self_attn", "SelfAttn"), ("cross_attn", "CrossAttn")):
        for part in ("query", "key", "value"):
            state[f"{ours}.{part}.weight"] = _into_heads(p, f"{name}/{theirs}/{part}")
        state[f"{ours}.out.weight"] = _out_of_heads(p, f"{name}/{theirs}/out")
    for ours, theirs in (("norm1", "LayerNorm1"), ("norm2", "LayerNorm2"), ("norm3", "LayerNorm3")):
        state |= {f"{ours}.{key}": value for key, value in _norm(p, f"{name}/{theirs}").items()}
    for ours, theirs in (("mlp.fc1", "MLP/Dense_0"), ("mlp.fc2", "MLP/Dense_1")):
        state |= {f"{ours}.{key}": value for key, value in _dense(p, f"{name}/{theirs}").items()}
    return state


def lm_state(arrays: Arrays, encoder_depth: int, decoder_depth: int) -> dict[str, torch.Tensor]:
    """The LM's state dict (without the normalisation buffers) from arrays named `params/...`."""
    p = {
        name.removeprefix("params/"): np.asarray(value) for name, value in arrays.items() if name.startswith("params/")
    }
    embedding = p["decoder/EmbedTargets/embedding"]
    state: dict[str, np.ndarray] = {
        "encoder.patch_embed.proj.weight": p["EmbedPatches/kernel"].transpose(3, 2, 0, 1),
        "encoder.patch_embed.proj.bias": p["EmbedPatches/bias"],
        "encoder.pos_embed": p["pos_embedding_encoder"],
        "positions": p["pos_embedding_decoder"],
        "token_embedding.weight": embedding,
        "start": embedding[:1][None],
    }
    state |= {f"encoder.norm.{key}": value for key, value in _norm(p, "encoder/encoder_norm").items()}
    state |= {f"norm.{key}": value for key, value in _norm(p, "decoder/LayerNorm").items()}
    state |= {f"head.{key}": value for key, value in _dense(p, "decoder/LogitsDense").items()}
    for i in range(encoder_depth):
        block = _encoder_block(p, f"encoder/encoderblock_{i}")
        state |= {f"encoder.blocks.{i}.{key}": value for key, value in block.items()}
    for i in range(decoder_depth):
        state |= {f"blocks.{i}.{key}": value for key, value in _decoder_block(p, f"decoder/EncDecBlock{i}").items()}
    return {name: torch.tensor(np.ascontiguousarray(value), dtype=torch.float32) for name, value in state.items()}
