"""Converts published UViM checkpoints to run directories like those of our own training (`uvim-fsq import-uvim`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from uvim_fsq.checkpoints.files import copy_checkpoint, save_checkpoint
from uvim_fsq.checkpoints.loading import build_lm, build_oracle, build_task, load_oracle, resolve
from uvim_fsq.checkpoints.run_directory import checkpoints, file_hash, resolve_checkpoint, weights_hash
from uvim_fsq.config.parse import dump_yaml
from uvim_fsq.config.schema import LMRun, OracleRun
from uvim_fsq.errors import UserError
from uvim_fsq.files import write_text
from uvim_fsq.interop.published import (
    LMShape,
    OracleShape,
    lm_rules,
    lm_shape,
    oracle_rules,
    oracle_shape,
    read_npz,
    translate,
)
from uvim_fsq.tasks.base import Categorical, Real, Task
from uvim_fsq.tasks.configuration import load_run
from uvim_fsq.tasks.registry import config_class

TASKS = {"depth": "nyu_depth", "panoptic": "coco_panoptic", "color": "imagenet_color"}


def import_oracle(file: Path, task: str, out: Path, overrides: Sequence[str] = ()) -> Path:
    """Imports a stage I checkpoint.

    Args:
        file: the .npz file.
        task: "depth", "panoptic" or "color", or the name of our task.
        out: the run directory to create.
        overrides: `key=value` strings, e.g. data.root=... for the category names.

    Returns `out`. Raises UserError for a file of another task or size, for missing or unknown arrays, and if `out`
    already contains checkpoints.
    """
    _refuse_existing(out)
    if task not in (*TASKS, *TASKS.values()):
        raise UserError(f"--task {task}: UViM published {', '.join(TASKS)}; give one of these")
    tensors = read_npz(file)
    shape = oracle_shape(tensors, str(file))
    run = resolve(load_run(_oracle_tree(shape, TASKS.get(task, task), out), overrides))
    assert isinstance(run, OracleRun)
    built = build_task(run)
    _check_channels(built, shape, file)
    real = {name: isinstance(channel, Real) for name, channel in built.label_channels.items()}
    with torch.device("meta"):
        oracle = build_oracle(run, built)
    weights = _check_shapes(oracle, translate(tensors, oracle_rules(shape, real), str(file)), file)
    return _write(out, run, weights, file)


def import_lm(file: Path, oracle: Path, out: Path, overrides: Sequence[str] = ()) -> Path:
    """Imports a stage II checkpoint.

    Args:
        file: the .npz file.
        oracle: the run or checkpoint directory of its oracle, imported or trained here.
        out: the run directory to create.
        overrides: `key=value` strings.

    Returns `out`. Raises UserError as `import_oracle` does, and if vocabulary, code length or image size differ from
    the oracle's.
    """
    _refuse_existing(out)
    tensors = read_npz(file)
    shape = lm_shape(tensors, str(file))
    run = resolve(load_run(_lm_tree(shape, oracle, out), overrides))
    assert isinstance(run, LMRun)
    frozen, _ = load_oracle(oracle)
    patches = (run.data.image_size // shape.patch_size) ** 2
    for what, found, wanted in (
        ("codes", shape.codes, frozen.quantizer.codebook_size),
        ("tokens", shape.length, frozen.code_length),
        ("image patches", shape.num_patches, patches),
    ):
        if found != wanted:
            raise UserError(
                f"{file} has {found} {what}, the oracle {oracle} has {wanted}; import the oracle that belongs to it"
            )
    with torch.device("meta"):
        lm = build_lm(run, frozen, published=False)
    half = torch.full((1, 3, 1, 1), 0.5)  # images in [-1, 1]
    weights = translate(tensors, lm_rules(shape), str(file)) | {"encoder.mean": half, "encoder.std": half.clone()}
    checked = _check_shapes(lm, weights, file)
    copy_checkpoint(resolve_checkpoint(oracle), out / "oracle")
    return _write(out, run, checked, file, weights_hash(out / "oracle"))


def _refuse_existing(out: Path) -> None:
    if checkpoints(out):
        raise UserError(f"{out} already holds checkpoints; choose another --out")


def _oracle_tree(shape: OracleShape, task: str, out: Path) -> dict[str, Any]:
    known = {field.name for field in dataclasses.fields(config_class(task))}
    options = {"num_bins": shape.classes.get("depth"), "max_instances": shape.classes.get("instances", 1) - 1}
    keys = ("patch_size", "width", "encoder_depth", "decoder_depth", "num_heads", "mlp_dim", "context")
    return {
        "stage": "oracle",
        "task": {"name": task, **{key: value for key, value in options.items() if key in known and value}},
        "data": {"image_size": round(shape.num_patches**0.5) * shape.patch_size},
        "model": {
            **{key: getattr(shape, key) for key in keys},
            # Half the patch grid in both directions. No array shows the code length.
            "code_length": shape.num_patches // 4,
            "quantizer": {"kind": "vq", "codebook_size": shape.codebook_size, "codeword_dim": shape.codeword_dim},
        },
        "optim": {"warmup_steps": 0},
        "train": {"out": str(out), "epochs": 1},
    }


def _lm_tree(shape: LMShape, oracle: Path, out: Path) -> dict[str, Any]:
    encoder = {
        "name": "vit_large_patch16_224",
        "act_layer": "gelu_tanh",
        "patch_size": shape.patch_size,
        "width": shape.encoder_width,
        "depth": shape.encoder_depth,
        "num_heads": shape.encoder_heads,
        "mlp_dim": shape.encoder_mlp,
    }
    keys = ("width", "depth", "num_heads", "mlp_dim")
    return {
        "stage": "lm",
        "oracle": str(oracle),
        "model": {"encoder": encoder, **{key: getattr(shape, key) for key in keys}},
        "optim": {"warmup_steps": 0},
        "train": {"out": str(out), "epochs": 1},
    }


def _check_channels(task: Task, shape: OracleShape, file: Path) -> None:
    wanted = {
        name: channel.num_classes if isinstance(channel, Categorical) else channel.channels
        for name, channel in task.label_channels.items()
    }
    if wanted != shape.classes:
        raise UserError(
            f"{file} is a checkpoint for labels {shape.classes}, but task {task.name} has {wanted}; "
            "give the --task that it was trained on"
        )


def _check_shapes(model: nn.Module, weights: dict[str, torch.Tensor], file: Path) -> dict[str, torch.Tensor]:
    """Returns the weights. Raises UserError unless they match the model's names and shapes exactly."""
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    wrong = [name for name in sorted(expected.keys() | weights.keys()) if not _same_shape(name, expected, weights)]
    if wrong:
        name = wrong[0]
        found = list(weights[name].shape) if name in weights else "nothing"
        raise UserError(
            f"{file}: {len(wrong)} arrays do not match the shapes of the model, e.g. {name}: "
            f"{found} instead of {list(expected.get(name, ()))}"
        )
    return weights


def _same_shape(name: str, expected: dict[str, tuple[int, ...]], weights: dict[str, torch.Tensor]) -> bool:
    return name in expected and name in weights and tuple(weights[name].shape) == expected[name]


def _write(
    out: Path, run: OracleRun | LMRun, weights: dict[str, torch.Tensor], file: Path, oracle_sha256: str | None = None
) -> Path:
    config = dump_yaml(run)
    write_text(out / "config.yaml", config)
    state = {"step": 0, "imported_from": file.name, "sha256": file_hash(file)}
    save_checkpoint(out, 0, config=config, weights=weights, state=state, oracle_sha256=oracle_sha256)
    return out
