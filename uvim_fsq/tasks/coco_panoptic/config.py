"""The keys under `task:` of coco_panoptic. Knows nothing of torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class CocoPanopticConfig:
    changeable = ("min_fraction", "image_dir")

    max_instances: int = 99
    """Instance numbers beside 0; of an image with more segments the largest are kept."""
    void: Literal["class", "ignore"] = "class"
    """Void pixels: class 0 of both maps, trained as such (the reference's), or ignore (-1: no input, no loss)."""
    crowd: Literal["keep", "ignore"] = "keep"
    """Crowd segments in training labels: ordinary segments (the reference's), or ignore (-1)."""
    min_fraction: float = 0.0
    """Predicted instances of at most this share of the image become void."""
    image_dir: str = ""
    """Folder of the photos, relative to data.root, if they lie elsewhere; {split} becomes train or val."""
    categories: tuple[tuple[int, str, bool], ...] = ()
    """(id, name, is a thing) of each class; read from the annotation file and kept in the checkpoint."""
