"""Small films."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from uvim_fsq.inference.films import writing_film


def gray_frames(count: int, size: tuple[int, int] = (24, 32)) -> list[np.ndarray]:
    """Frames of one gray level each, which rises from 10 in steps of 30."""
    return [np.full((*size, 3), 10 + 30 * number, np.uint8) for number in range(count)]


def film(file: Path, count: int, size: tuple[int, int] = (24, 32), rate: float = 10) -> Path:
    """A film of `gray_frames`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with writing_film(file, rate) as writer:
        for frame in gray_frames(count, size):
            writer.write(frame)
    return file
