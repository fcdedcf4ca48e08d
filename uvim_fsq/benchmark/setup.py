"""Builds models with random weights from a configuration, and synthetic batches that need no data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch

from uvim_fsq.checkpoints.hub import is_hub
from uvim_fsq.checkpoints.loading import build_lm, build_oracle, build_task
from uvim_fsq.checkpoints.run_directory import read_oracle_config
from uvim_fsq.config.rules import validate
from uvim_fsq.config.schema import DirectRun, LMRun, OracleRun
from uvim_fsq.config.shipped import find_config
from uvim_fsq.data.sample import Batch
from uvim_fsq.errors import UserError
from uvim_fsq.layers import lay_out_weights
from uvim_fsq.lm.base import TokenModel
from uvim_fsq.oracle.model import Oracle
from uvim_fsq.tasks.base import Real, Task
from uvim_fsq.tasks.configuration import load_run, resolve_lm
from uvim_fsq.tasks.registry import load_plugins, task_class

R = TypeVar("R", bound=OracleRun | DirectRun)


@dataclass(frozen=True)
class Sizes:
    """The configurations to benchmark. `lm` is None for a configuration of stage I."""

    oracle: OracleRun
    lm: LMRun | None

    @property
    def run(self) -> OracleRun | LMRun:
        return self.lm or self.oracle


def read_sizes(config: str | Path, overrides: Sequence[str] = (), oracle: Path | None = None) -> Sizes:
    """Reads a configuration of either stage. Neither weights nor data need to exist.

    The oracle of an LM configuration is the configuration `oracle` if given, else the run that its key `oracle` names,
    else the file in the same folder with "oracle" in place of "lm" in its name, else the folder's oracle.yaml.

    Raises:
        UserError: there is no oracle, a configuration is invalid, or it is one of the direct baseline.
    """
    config = find_config(config)
    place = ["train.out=unused"]
    run = load_run(config, [*place, *overrides])
    if oracle is not None and not isinstance(run, LMRun):
        raise UserError(f"--oracle is the configuration of an LM's oracle, and {config} is of stage {run.stage}")
    if isinstance(run, OracleRun):
        run = with_categories(run)
        validate(run)
        return Sizes(run, None)
    if not isinstance(run, LMRun):
        raise UserError(f"{config} is a configuration of stage {run.stage!r}; the benchmark measures oracles and LMs")
    oracle_run = with_categories(_oracle_of(config, run, oracle))
    run = resolve_lm(run, oracle_run)
    validate(run)
    # Download nothing: random weights take the same time.
    run = replace(run, model=replace(run.model, encoder=replace(run.model.encoder, weights="none")))
    return Sizes(oracle_run, run)


def _oracle_of(config: Path, run: LMRun, given: Path | None) -> OracleRun:
    if given is None and (is_hub(run.oracle) or Path(run.oracle).exists()):
        return read_oracle_config(run.oracle)[0]
    file = given or config.with_name(config.name.replace("lm", "oracle"))
    if given is None and not file.is_file() and config.with_name("oracle.yaml").is_file():
        file = config.with_name("oracle.yaml")
    if not file.is_file() or file == config:
        raise UserError(f"{config}: neither the run oracle={run.oracle} nor {file} exists; name a file with --oracle")
    found = load_run(file, ["train.out=unused"])
    if not isinstance(found, OracleRun):
        raise UserError(f"{file} is not a configuration of stage oracle")
    return found


def with_categories(run: R) -> R:
    """The configuration with its task resolved from the data, or without data by `Task.placeholder_config`."""
    load_plugins(run.plugins)
    task = task_class(run.task.name)
    try:
        options = task.resolve_config(run.task.options, run.data.root)
    except UserError:
        options = task.placeholder_config(run.task.options)
    return replace(run, task=replace(run.task, options=options))


def fresh_oracle(sizes: Sizes) -> tuple[Oracle, Task]:
    """A frozen oracle with random weights, and its task."""
    torch.manual_seed(0)
    task = build_task(sizes.oracle)
    return build_oracle(sizes.oracle, task).eval().requires_grad_(False), task


def fresh_lm(sizes: Sizes, device: torch.device) -> tuple[TokenModel, Task]:
    """An LM with random weights, in evaluation mode, and its task."""
    assert sizes.lm is not None
    oracle, task = fresh_oracle(sizes)
    lm = build_lm(sizes.lm, oracle, published=False)
    lm.randomize_head_()
    if device.type == "cpu":
        lay_out_weights(lm)
    return lm.to(device).eval(), task


def synthetic_batch(task: Task, size: int, count: int, device: torch.device) -> Batch:
    """Random images, and label maps of constant blocks an eighth of the image wide, since real labels are mostly
    constant over such areas.

    Images (count, 3, size, size) are uint8; labels (count, size, size[, C]) are integers or floats in [-1, 1].
    """
    generator = torch.Generator().manual_seed(0)
    block = max(1, size // 8)
    cells = -(-size // block)
    labels = {}
    for name, channel in task.label_channels.items():
        if isinstance(channel, Real):
            labels[name] = torch.rand(count, size, size, channel.channels, generator=generator) * 2 - 1
        else:
            coarse = torch.randint(channel.num_classes, (count, cells, cells), generator=generator)
            fine = coarse.repeat_interleave(block, 1).repeat_interleave(block, 2)[:, :size, :size]
            labels[name] = fine.to(torch.uint8 if channel.num_classes <= 256 else torch.int16)
    image = torch.randint(256, (count, 3, size, size), generator=generator, dtype=torch.uint8)
    return Batch(
        image=image.to(device),
        labels={name: x.to(device) for name, x in labels.items()},
        index=torch.arange(count),
        id=[str(i) for i in range(count)],
    )
