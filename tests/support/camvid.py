"""Synthetic photos for the task in examples/."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from uvim_fsq.synthetic.render import render

PLUGIN = "examples.camvid_segmentation.camvid_segmentation"


def camvid_data(root: Path) -> Path:
    """Writes 10 training and 4 validation photos of 24 x 32 with label maps in CamVid's layout."""
    for split, count in (("train", 10), ("val", 4)):
        for name in (split, f"{split}annot"):
            (root / name).mkdir(parents=True)
        for i in range(count):
            scene = render(1, i + 100 * (split == "val"), (24, 32))
            Image.fromarray(scene.image).save(root / split / f"{i}.jpg")
            Image.fromarray((scene.segments % 12).astype(np.uint8)).save(root / f"{split}annot" / f"{i}.png")
    return root
