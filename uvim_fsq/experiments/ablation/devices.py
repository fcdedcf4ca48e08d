"""Assigns the cells of a grid to devices, and splits batches so that they fit into a device's memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from uvim_fsq.config.schema import LMRun
from uvim_fsq.errors import UserError
from uvim_fsq.experiments.ablation.grid import Cell, Training
from uvim_fsq.performance.memory import USABLE


@dataclass(frozen=True)
class Devices:
    """The available GPUs.

    Attributes:
        names: for each GPU, the value of CUDA_VISIBLE_DEVICES with which a process sees only it.
        memory: memory of the smallest GPU, in bytes.
    """

    names: tuple[str, ...] = ()
    memory: float = 0.0

    def memory_per_process(self, jobs: int) -> float:
        """Bytes that each process may use while `jobs` processes run at a time."""
        return USABLE * self.memory / -(-jobs // len(self.names))


def visible_devices(environment: Mapping[str, str], count: int) -> tuple[str, ...]:
    """Names of the `count` devices that CUDA sees: the user's CUDA_VISIBLE_DEVICES (numbers or UUIDs), else numbers."""
    given = environment.get("CUDA_VISIBLE_DEVICES")
    names = map(str, range(count)) if given is None else [name.strip() for name in given.split(",")]
    return tuple(names)[:count]


def find_devices() -> Devices:
    """The GPUs that this process sees."""
    import torch

    count = torch.cuda.device_count()
    if count == 0:
        return Devices()
    memory = min(torch.cuda.get_device_properties(i).total_memory for i in range(count))
    return Devices(visible_devices(os.environ, count), memory)


def fit_cells(cells: Sequence[Cell], devices: Devices, jobs: int, say: Callable[[str], object]) -> list[Cell]:
    """The cells, with `train.accumulate` raised where a batch does not fit into a device; `say` gets a line for each.

    Raises:
        UserError: a cell does not fit even with single images.
    """
    if not devices.names:
        return list(cells)
    found: dict[str, tuple[int, str]] = {}
    reasons: dict[str, list[str]] = {}
    fitted: list[Cell] = []
    for cell in cells:
        trainings: list[Training] = []
        for number, training in enumerate(cell.trainings):
            sizes = _sizes(cell, number)
            if sizes not in found:
                found[sizes] = _accumulate(cell, number, devices.memory_per_process(jobs))
            count, reason = found[sizes]
            if count != training.run.train.accumulate:
                training = replace(training, command=(*training.command, f"train.accumulate={count}"))
                reasons.setdefault(reason, []).append(cell.name)
            trainings.append(training)
        fitted.append(replace(cell, trainings=tuple(trainings)))
    for reason, names in reasons.items():
        say(f"{reason} ({names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''})")
    return fitted


def _sizes(cell: Cell, number: int) -> str:
    """Everything that the memory of a training depends on, so that it is estimated once for equal ones."""
    runs = [training.run for training in cell.trainings[: number + 1]]
    train = [(run.train.batch_size, run.train.accumulate, run.train.precision, run.train.ema) for run in runs]
    return repr([(run.model, run.task, run.data.image_size, run.optim.name) for run in runs] + train[-1:])


def _accumulate(cell: Cell, number: int, available: float) -> tuple[int, str]:
    """The number of micro-batches that a training of a cell needs, and the reason as one line."""
    from uvim_fsq.benchmark.memory import memory_of
    from uvim_fsq.performance.memory import smallest_accumulate

    run, name = cell.trainings[number].run, cell.trainings[number].name
    first = cell.trainings[0].run
    assert not isinstance(first, LMRun)
    memory = memory_of(first, run if isinstance(run, LMRun) else None)
    count = smallest_accumulate(memory, run.train, available)
    room = f"a device has {available / 1e9:.3g} GB available"
    if count is None:
        need = f"{memory.of(1) / 1e9:.3g} GB with one image at a time"
        raise UserError(f"{cell.name}: the {name} needs {need}, but {room}; use fewer --jobs or a larger device")
    images = run.train.batch_size // run.train.accumulate
    whole = f"{images} images at once take {memory.of(images) / 1e9:.3g} GB"
    return count, f"{name}: train.accumulate={count}, because {whole}, but {room}"
