"""Small runs for the tests: synthetic scenes in the real formats and configurations that train in seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from uvim_fsq.checkpoints.loading import resolve
from uvim_fsq.config.schema import Run
from uvim_fsq.lm.base import TokenModel
from uvim_fsq.lm.sampling import Sampling
from uvim_fsq.synthetic.writers import write_dataset
from uvim_fsq.tasks.base import Categorical, Task
from uvim_fsq.tasks.coco_panoptic.task import CocoPanoptic, CocoPanopticConfig
from uvim_fsq.tasks.configuration import load_run
from uvim_fsq.tasks.imagenet_color.task import ImagenetColor, ImagenetColorConfig
from uvim_fsq.tasks.nyu_depth.task import NYUDepth, NYUDepthConfig

ORACLE: dict[str, Any] = {
    "stage": "oracle",
    "task": {"name": "nyu_depth", "protocol": "full", "num_bins": 16},
    "data": {"image_size": 16, "workers": 0},
    "model": {
        "patch_size": 4,
        "width": 16,
        "encoder_depth": 1,
        "decoder_depth": 1,
        "num_heads": 2,
        "mlp_dim": 32,
        "code_length": 4,
        "quantizer": {"levels": [5, 5]},
    },
    "optim": {"name": "adamw", "lr": 1e-3, "warmup_steps": 2},
    "train": {"batch_size": 8, "steps": 6, "precision": "fp32", "log_every": 1},
    "eval": {"batch_size": 4, "workers": 0},
}
LM: dict[str, Any] = {
    "stage": "lm",
    "data": {"workers": 0},
    "model": {
        "encoder": {
            "name": "vit_tiny_patch16_224",
            "patch_size": 4,
            "width": 16,
            "depth": 1,
            "num_heads": 2,
            "mlp_dim": 32,
        },
        "width": 16,
        "depth": 1,
        "num_heads": 2,
        "mlp_dim": 32,
    },
    "optim": {"name": "adamw", "lr": 1e-3, "warmup_steps": 2},
    "train": {"batch_size": 8, "steps": 6, "precision": "fp32", "log_every": 1},
    "eval": {"batch_size": 4, "workers": 0},
}
DIRECT: dict[str, Any] = {
    **ORACLE,
    "stage": "direct",
    "model": {**LM["model"], "patch_size": 4},
}
#: Settings of the built-in tasks that fit small scenes.
TASK_OPTIONS: dict[str, dict[str, Any]] = {"nyu_depth": {"protocol": "full", "num_bins": 16}}
#: The three tasks with few classes.
TASKS: dict[str, Task] = {
    "depth": NYUDepth(NYUDepthConfig(num_bins=16)),
    "panoptic": CocoPanoptic(
        CocoPanopticConfig(max_instances=5, categories=((1, "cat", True), (2, "sky", False)), void="ignore")
    ),
    "color": ImagenetColor(ImagenetColorConfig()),
}


def random_batch(task: Task, batch: int, side: int = 16) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Random labels of the task, -1 among them, and random images."""
    generator = torch.Generator().manual_seed(0)
    labels: dict[str, torch.Tensor] = {}
    for name, channel in task.label_channels.items():
        if isinstance(channel, Categorical):
            drawn = torch.randint(-1, channel.num_classes, (batch, side, side), generator=generator)
            labels[name] = drawn.to(torch.int16)
        else:
            labels[name] = torch.rand(batch, side, side, channel.channels, generator=generator) * 2 - 1
    return labels, torch.randint(0, 256, (batch, 3, side, side), generator=generator).to(torch.uint8)


def small_data(folder: Path, num: int = 24, num_val: int = 6, layout: str = "h5") -> Path:
    """A few 24 x 32 scenes in one of the NYU layouts."""
    write_dataset("nyu", folder, num, (24, 32), num_val=num_val, layout=layout, workers=1)
    return folder


def oracle_run(out: Path, data: Path, *overrides: str) -> Run:
    """A resolved small stage-I configuration."""
    return resolve(load_run(ORACLE, [f"train.out={out}", f"data.root={data}", *overrides]))


def lm_run(out: Path, oracle: Path, *overrides: str) -> Run:
    """A resolved small stage-II configuration on a trained oracle."""
    return resolve(load_run(LM, [f"train.out={out}", f"oracle={oracle}", *overrides]))


def direct_run(out: Path, data: Path, *overrides: str) -> Run:
    """A resolved small configuration of the direct baseline."""
    return resolve(load_run(DIRECT, [f"train.out={out}", f"data.root={data}", *overrides]))


def stage_run(stage: str, out: Path, data: Path, oracle: Path, *overrides: str) -> Run:
    """`oracle_run`, `lm_run` or `direct_run`; stage "masked" is an `lm_run` with a masked model."""
    if stage in ("lm", "masked"):
        return lm_run(out, oracle, *(["model.kind=masked"] if stage == "masked" else []), *overrides)
    return (oracle_run if stage == "oracle" else direct_run)(out, data, *overrides)


def generate(
    lm: TokenModel,
    images: torch.Tensor,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seeds: torch.Tensor | None = None,
) -> torch.Tensor:
    """The tokens (B, L) of `lm.generate`."""
    return lm.generate(images, Sampling(temperature, top_k, top_p), seeds).tokens
