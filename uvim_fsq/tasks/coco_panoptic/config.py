"""The keys under `task:` of coco_panoptic. Does not import torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class CocoPanopticConfig:
    """The keys under `task:` of panoptic segmentation."""

    changeable = ("min_fraction", "image_dir", "colors")

    annotations: Literal["auto", "panoptic", "instances"] = "auto"
    """What to read: panoptic (JSON and id PNGs), instances (JSON with masks of things), or auto: panoptic if any."""
    max_instances: int = 99
    """Largest instance number (0 is void); of an image with more segments, the largest ones are kept."""
    void: Literal["class", "ignore"] = "class"
    """Void pixels: class, trained as class 0 of both maps (as in the reference), or ignore (-1: no input, no loss)."""
    crowd: Literal["keep", "ignore"] = "keep"
    """Crowd segments in training labels: keep as ordinary segments (as in the reference), or ignore (-1)."""
    min_fraction: float = 0.0
    """Predicted instances that cover at most this fraction of the image become void."""
    image_dir: str = ""
    """Folder of the images under data.root, if not in a standard place; {split} becomes train(ing) or val(idation)."""
    categories: tuple[tuple[int, str, bool], ...] = ()
    """(id, name, is a thing) of each class; read from the annotation file and stored in the checkpoint."""
    colors: tuple[tuple[int, int, int], ...] = ()
    """(red, green, blue), 0..255, of each class in pictures; read from the annotation file if it has them."""
