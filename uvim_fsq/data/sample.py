"""What a data adapter yields and what a loader delivers. Knows nothing of files, tasks or models.

Shapes: H, W native image size; S model input size; B batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol, TypedDict

import numpy as np
import numpy.typing as npt
import torch

#: A NumPy array; shape and dtype stand in the docstrings.
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Sample:
    """One image with its label maps, before any task encoding.

    Attributes:
        id: name that is unique in its data set and stable over runs, e.g. the file's relative path.
        image: (H, W, 3) uint8 RGB.
        maps: name -> (H, W) or (H, W, C) array in the same pixel grid as the image. Integer maps must be int32,
            real ones float32; all are resampled by nearest neighbour, a map named in `Task.linear_maps` bilinearly.
        meta: whatever the task's metric and writers need (original size, scene, file names).
    """

    id: str
    image: Array
    maps: dict[str, Array] = field(default_factory=dict[str, Array])
    meta: dict[str, Any] = field(default_factory=dict[str, Any])


def smallest_integer(lowest: int, highest: int) -> np.dtype[Any]:
    """The smallest of uint8, int8, int16 and int32 that holds all values from `lowest` to `highest`."""
    kinds = [np.dtype(kind) for kind in (np.uint8, np.int8, np.int16, np.int32)]
    return next(kind for kind in kinds if np.iinfo(kind).min <= lowest and highest <= np.iinfo(kind).max)


class SampleSource(Protocol):
    """A data adapter: a sized, indexable source of `Sample`s, cheap to pickle to loader workers (no open files).

    `__getitem__` raises `uvim_fsq.errors.UserError` naming the file when a sample cannot be read.
    `info` is what every evaluation result repeats: at least `layout`, `split`, `count`; for depth also `ground_truth`.
    """

    info: dict[str, Any]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


class Batch(TypedDict):
    """What the loader delivers; nothing is normalised before it is on the device.

    image: (B, 3, S, S) uint8. labels: name -> (B, S, S) integer class indices (-1 = no label) or (B, S, S, C) float32
    or uint8, as `Task.encode` made them; `uvim_fsq.data.batch.to_device` makes the latter float32 in [-1, 1].
    index: (B,) int64 position of each sample in its source. id: list of B strings.
    """

    image: torch.Tensor
    labels: dict[str, torch.Tensor]
    index: torch.Tensor
    id: list[str]
