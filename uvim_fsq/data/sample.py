"""The types that data adapters return (`Sample`) and loaders yield (`Batch`). Independent of files, tasks and models.

Shapes: B batch, H and W native image size, S model input size, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol, TypedDict

import numpy as np
import numpy.typing as npt
import torch

#: A NumPy array; docstrings give shape and dtype.
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Sample:
    """One image with its label maps, before the task encodes it.

    Attributes:
        id: name that is unique in the data set and stable across runs, e.g. the relative path of the file.
        image: (H, W, 3) uint8 RGB.
        maps: name -> (H, W) or (H, W, C) array on the image's pixel grid; integer maps must be int32, real ones
            float32. They are resized by nearest neighbor, or bilinearly if listed in `Task.linear_maps`.
        meta: whatever the task's metric and writers need (original size, scene, file names).
    """

    id: str
    image: Array
    maps: dict[str, Array] = field(default_factory=dict[str, Array])
    meta: dict[str, Any] = field(default_factory=dict[str, Any])


def smallest_integer(lowest: int, highest: int) -> np.dtype[Any]:
    """The smallest of uint8, int8, int16 and int32 that can hold all values from `lowest` to `highest`."""
    kinds = [np.dtype(kind) for kind in (np.uint8, np.int8, np.int16, np.int32)]
    return next(kind for kind in kinds if np.iinfo(kind).min <= lowest and highest <= np.iinfo(kind).max)


class SampleSource(Protocol):
    """A data adapter: a sized, indexable source of samples, cheap to pickle for loader processes (no open files).

    `__getitem__` raises `uvim_fsq.errors.UserError` naming the file if a sample cannot be read.
    `info` is recorded in every evaluation result: at least `layout`, `split` and `count`; for depth also
    `ground_truth`.
    """

    info: dict[str, Any]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


class Batch(TypedDict):
    """One batch, as the loader yields it. Nothing is normalized before the batch is on the device.

    Attributes:
        image: (B, 3, S, S) uint8, or float32 in [-1, 1], as `Task.model_image` returns it.
        labels: channel -> (B, S, S) integer class indices (-1: no label), or (B, S, S, C) float32 or uint8, as
            `Task.encode` returns them. `uvim_fsq.data.batch.to_device` converts the latter to float32 in [-1, 1].
        index: (B,) int64 position of each sample in its source.
        id: the B sample ids.
    """

    image: torch.Tensor
    labels: dict[str, torch.Tensor]
    index: torch.Tensor
    id: list[str]
