"""Converts published UViM checkpoints to state dicts of our models.

The checkpoints are .npz files with the names and layouts of the UViM reference code (big_vision, JAX). There, dense
kernels are (in, out), attention kernels (width, heads, head size), convolutions HWIO, label embeddings
(classes, pixels, width) and heads (width, classes, pixels). Our linear maps are (out, in), and our label tables and
heads are pixel-major. The reference's LM includes the start symbol 0 in its vocabulary. Ours has a separate start
vector, so our token t is the reference's t + 1.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from uvim_fsq.data.arrays import check_npz
from uvim_fsq.errors import UserError

Tensors = Mapping[str, torch.Tensor]
#: (our name, names of the published arrays, function that makes our tensor from them).
Rule = tuple[str, tuple[str, ...], Callable[..., torch.Tensor]]


def read_npz(file: Path) -> dict[str, torch.Tensor]:
    """Reads all arrays of a published checkpoint as float32, with "params/" removed from their names. Never unpickles.

    Raises UserError for a missing or damaged file, and for anything but arrays of real numbers.
    """
    tensors: dict[str, torch.Tensor] = {}
    try:
        check_npz(file)
        with np.load(file, allow_pickle=False) as arrays:
            for name in arrays.files:
                array = arrays[name]
                if array.dtype.kind not in "fiu":
                    raise UserError(f"{file}: {name} holds {array.dtype}, not real numbers")
                tensors[name.removeprefix("params/")] = torch.from_numpy(np.array(array, np.float32))
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{file} is not an .npz of plain arrays ({error}); pickled data is never loaded") from error
    except (OSError, EOFError, KeyError, zipfile.BadZipFile, AttributeError) as error:
        raise UserError(f"{file} is truncated or not an .npz file ({error}); download it again") from error
    return tensors


def translate(tensors: Tensors, rules: list[Rule], file: str) -> dict[str, torch.Tensor]:
    """Applies the rules to the arrays of a file: our name -> tensor.

    Raises UserError, listing the arrays, if rules need arrays that are missing or if no rule uses an array.
    """
    wanted = [name for _, theirs, _ in rules for name in theirs]
    # Several rules may use the same array. The start vector and the token table, for example, are slices of one.
    missing = sorted(set(wanted) - set(tensors))
    unknown = sorted(set(tensors) - set(wanted))
    if missing or unknown:
        parts = [
            f"{len(names)} {kind} ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})"
            for kind, names in (("missing", missing), ("unknown", unknown))
            if names
        ]
        raise UserError(
            f"{file} does not contain the arrays that its shapes imply: {' and '.join(parts)} arrays; "
            "check --stage, or download the file again"
        )
    return {ours: make(*(tensors[name] for name in theirs)).contiguous() for ours, theirs, make in rules}


def _same(x: torch.Tensor) -> torch.Tensor:
    return x


def _transposed(kernel: torch.Tensor) -> torch.Tensor:
    return kernel.T


def _dense(ours: str, theirs: str) -> Iterator[Rule]:
    yield f"{ours}.weight", (f"{theirs}/kernel",), _transposed
    yield f"{ours}.bias", (f"{theirs}/bias",), _same


def _norm(ours: str, theirs: str) -> Iterator[Rule]:
    yield f"{ours}.weight", (f"{theirs}/scale",), _same
    yield f"{ours}.bias", (f"{theirs}/bias",), _same


def _into_heads(kernel: torch.Tensor) -> torch.Tensor:
    return kernel.flatten(1).T


def _out_of_heads(kernel: torch.Tensor) -> torch.Tensor:
    return kernel.flatten(0, 1).T


def _attention(ours: str, theirs: str, *, bias: bool) -> Iterator[Rule]:
    for part in ("query", "key", "value"):
        yield f"{ours}.{part}.weight", (f"{theirs}/{part}/kernel",), _into_heads
        if bias:
            yield f"{ours}.{part}.bias", (f"{theirs}/{part}/bias",), torch.flatten
    yield f"{ours}.out.weight", (f"{theirs}/out/kernel",), _out_of_heads
    if bias:
        yield f"{ours}.out.bias", (f"{theirs}/out/bias",), _same


def _encoder_block(ours: str, theirs: str, *, fused: bool) -> Iterator[Rule]:
    """A ViT block. `fused`: query, key and value are one map, as in timm."""
    attention = f"{theirs}/MultiHeadDotProductAttention_0"
    yield from _norm(f"{ours}.norm1", f"{theirs}/LayerNorm_0")
    yield from _norm(f"{ours}.norm2", f"{theirs}/LayerNorm_1")
    yield from _dense(f"{ours}.mlp.fc1", f"{theirs}/MlpBlock_0/Dense_0")
    yield from _dense(f"{ours}.mlp.fc2", f"{theirs}/MlpBlock_0/Dense_1")
    if not fused:
        yield from _attention(f"{ours}.attn", attention, bias=True)
        return
    parts = [f"{attention}/{part}" for part in ("query", "key", "value")]
    yield (
        f"{ours}.attn.qkv.weight",
        tuple(f"{part}/kernel" for part in parts),
        lambda *kernels: torch.cat([_into_heads(kernel) for kernel in kernels]),
    )
    yield (
        f"{ours}.attn.qkv.bias",
        tuple(f"{part}/bias" for part in parts),
        lambda *biases: torch.cat([bias.flatten() for bias in biases]),
    )
    yield f"{ours}.attn.proj.weight", (f"{attention}/out/kernel",), _out_of_heads
    yield f"{ours}.attn.proj.bias", (f"{attention}/out/bias",), _same


def _label_rules(channel: str, real: bool) -> Iterator[Rule]:
    def table(kernel: torch.Tensor) -> torch.Tensor:
        rows = kernel.transpose(0, 1).flatten(0, 1)  # (pixels * classes, width)
        return rows.T if real else rows

    ours, linear = f"label_embed.channels.{channel}", "proj." if real else ""
    yield f"{ours}.{linear}weight", (f"embedding_{channel}/kernel",), table
    yield f"{ours}.{linear}bias", (f"embedding_{channel}/bias",), _same
    head = f"label_head.heads.{channel}"
    yield f"{head}.weight", (f"head_{channel}/kernel",), lambda kernel: kernel.permute(2, 1, 0).flatten(0, 1)
    yield f"{head}.bias", (f"head_{channel}/bias",), lambda bias: bias.T.flatten()


@dataclass(frozen=True)
class OracleShape:
    """The architecture given by the array shapes of a stage I file. `classes`: channel -> classes or real channels."""

    patch_size: int
    width: int
    encoder_depth: int
    decoder_depth: int
    num_heads: int
    mlp_dim: int
    num_patches: int
    context: str
    codebook_size: int
    codeword_dim: int
    classes: dict[str, int]


def _count(tensors: Tensors, prefix: str) -> int:
    return len({name.split("/")[1] for name in tensors if name.startswith(prefix)})


def _shape(tensors: Tensors, name: str, file: str, dims: int) -> tuple[int, ...]:
    if name not in tensors or tensors[name].dim() != dims:
        found = f"has shape {list(tensors[name].shape)}" if name in tensors else "is missing"
        raise UserError(f"{file} is not such a checkpoint: array {name} {found}; check --stage")
    return tuple(tensors[name].shape)


def oracle_shape(tensors: Tensors, file: str) -> OracleShape:
    """The architecture of a stage I file. Raises UserError if it is not a stage I file."""
    channels = sorted(name.split("/")[0][10:] for name in tensors if name.startswith("embedding_") and "kernel" in name)
    if not channels:
        raise UserError(
            f"{file} is not a stage I checkpoint: it contains no embedding_*/kernel; give --stage lm for stage II"
        )
    shapes = {channel: _shape(tensors, f"embedding_{channel}/kernel", file, 3) for channel in channels}
    _, pixels, width = shapes[channels[0]]
    query = "encoder/encoderblock_0/MultiHeadDotProductAttention_0/query/kernel"
    sides = {
        kind: f"ctx_{short}_embedding/kernel" in tensors for kind, short in (("encoder", "enc"), ("decoder", "dec"))
    }
    seen = [kind for kind, there in sides.items() if there]
    return OracleShape(
        patch_size=round(pixels**0.5),
        width=width,
        encoder_depth=_count(tensors, "encoder/encoderblock_"),
        decoder_depth=_count(tensors, "decoder/encoderblock_"),
        num_heads=_shape(tensors, query, file, 3)[1],
        mlp_dim=_shape(tensors, "encoder/encoderblock_0/MlpBlock_0/Dense_0/kernel", file, 2)[1],
        num_patches=_shape(tensors, "pos_embedding_encoder", file, 3)[1],
        context="both" if len(seen) == 2 else seen[0] if seen else "none",
        codebook_size=_shape(tensors, "state/dictionary", file, 2)[0],
        codeword_dim=_shape(tensors, "state/dictionary", file, 2)[1],
        classes={channel: shape[0] for channel, shape in shapes.items()},
    )


def oracle_rules(shape: OracleShape, real: Mapping[str, bool]) -> list[Rule]:
    """The rules for our oracle. `real`: label channel -> whether it has real values instead of classes."""
    rules: list[Rule] = []
    for side, short in (("encoder", "enc"), ("decoder", "dec")):
        if shape.context in ("both", side):
            theirs = f"ctx_{short}_embedding"
            rules.append((f"{side}_context.proj.weight", (f"{theirs}/kernel",), lambda kernel: kernel.flatten(0, 2).T))
            rules.append((f"{side}_context.proj.bias", (f"{theirs}/bias",), _same))
        rules.append((f"{side}_positions", (f"pos_embedding_{side}",), _same))
        rules += _norm(f"{side}.norm", f"{side}/encoder_norm")
        for i in range(shape.encoder_depth if side == "encoder" else shape.decoder_depth):
            rules += _encoder_block(f"{side}.blocks.{i}", f"{side}/encoderblock_{i}", fused=False)
    rules += [*_dense("encoder_head", "encoder_head"), *_dense("decoder_stem", "decoder_stem")]
    for channel, is_real in real.items():
        rules += _label_rules(channel, is_real)
    rules.append(("quantizer.sums", ("state/dictionary",), _same))
    rules.append(("quantizer.counts", ("state/counts",), _same))
    return rules


@dataclass(frozen=True)
class LMShape:
    """The architecture given by the array shapes of a stage II file. `codes` does not count the start symbol."""

    patch_size: int
    encoder_width: int
    encoder_depth: int
    encoder_heads: int
    encoder_mlp: int
    num_patches: int
    width: int
    depth: int
    num_heads: int
    mlp_dim: int
    length: int
    codes: int


def lm_shape(tensors: Tensors, file: str) -> LMShape:
    """The architecture of a stage II file. Raises UserError if it is not a stage II file."""
    patch = _shape(tensors, "EmbedPatches/kernel", file, 4)
    query = "encoder/encoderblock_0/MultiHeadDotProductAttention_0/query/kernel"
    decoder_query = _shape(tensors, "decoder/EncDecBlock0/SelfAttn/query/kernel", file, 3)
    return LMShape(
        patch_size=patch[0],
        encoder_width=patch[3],
        encoder_depth=_count(tensors, "encoder/encoderblock_"),
        encoder_heads=_shape(tensors, query, file, 3)[1],
        encoder_mlp=_shape(tensors, "encoder/encoderblock_0/MlpBlock_0/Dense_0/kernel", file, 2)[1],
        num_patches=_shape(tensors, "pos_embedding_encoder", file, 3)[1],
        width=decoder_query[0],
        depth=_count(tensors, "decoder/EncDecBlock"),
        num_heads=decoder_query[1],
        mlp_dim=_shape(tensors, "decoder/EncDecBlock0/MLP/Dense_0/kernel", file, 2)[1],
        length=_shape(tensors, "pos_embedding_decoder", file, 3)[1],
        codes=_shape(tensors, "decoder/EmbedTargets/embedding", file, 2)[0] - 1,
    )


def lm_rules(shape: LMShape) -> list[Rule]:
    """The rules for all parameters of our LM. The mean and std of the image normalization are not in the file."""
    table = ("decoder/EmbedTargets/embedding",)
    rules: list[Rule] = [
        ("encoder.model.patch_embed.proj.weight", ("EmbedPatches/kernel",), lambda kernel: kernel.permute(3, 2, 0, 1)),
        ("encoder.model.patch_embed.proj.bias", ("EmbedPatches/bias",), _same),
        ("encoder.model.pos_embed", ("pos_embedding_encoder",), _same),
        ("positions", ("pos_embedding_decoder",), _same),
        ("token_embedding.weight", table, lambda embedding: embedding[1:]),
        ("start", table, lambda embedding: embedding[None, :1]),
        ("head.weight", ("decoder/LogitsDense/kernel",), lambda kernel: kernel.T[1:]),
        ("head.bias", ("decoder/LogitsDense/bias",), lambda bias: bias[1:]),
        *_norm("encoder.model.norm", "encoder/encoder_norm"),
        *_norm("norm", "decoder/LayerNorm"),
    ]
    for i in range(shape.encoder_depth):
        rules += _encoder_block(f"encoder.model.blocks.{i}", f"encoder/encoderblock_{i}", fused=True)
    for i in range(shape.depth):
        ours, theirs = f"blocks.{i}", f"decoder/EncDecBlock{i}"
        rules += _attention(f"{ours}.self_attn", f"{theirs}/SelfAttn", bias=False)
        rules += _attention(f"{ours}.cross_attn", f"{theirs}/CrossAttn", bias=False)
        for k in (1, 2, 3):
            rules += _norm(f"{ours}.norm{k}", f"{theirs}/LayerNorm{k}")
        rules += _dense(f"{ours}.mlp.fc1", f"{theirs}/MLP/Dense_0")
        rules += _dense(f"{ours}.mlp.fc2", f"{theirs}/MLP/Dense_1")
    return rules
