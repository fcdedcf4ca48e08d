"""Photos on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from uvim_fsq.data.sample import Sample

#: Weights of red, green and blue in the brightness of a pixel.
LUMA = np.array([0.2989, 0.5870, 0.1140])


def photo(path: Path, value: int = 0, size: tuple[int, int] = (6, 4)) -> None:
    """A PNG of one gray level, whatever its suffix; `size` is width and height."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size[1], size[0], 3), value, np.uint8)).save(path, format="PNG")


def train_tree(folder: Path, classes: int = 3, each: int = 7) -> None:
    """Classes of photos named as ImageNet's training photos."""
    for c in range(classes):
        for i in range(each):
            photo(folder / f"n{c:08d}" / f"n{c:08d}_{i}.JPEG", 10 * c + i)


def random_photo(height: int = 20, width: int = 30, seed: int = 0) -> Sample:
    """A sample with random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Sample("x", pixels)


def noise_photo(file: Path, seed: int = 0, size: tuple[int, int] = (20, 30)) -> Path:
    """A file of noise; `size` is height and width."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)).save(file)
    return file
