"""The keys under `task:` of nyu_depth. Knows nothing of torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class NYUDepthConfig:
    changeable = ("protocol", "decoding", "ground_truth", "image_dir", "depth_dir", "depth_scale")

    num_bins: int = 256
    """Linear depth bins between min_depth and max_depth."""
    min_depth: float = 0.001
    """Smallest depth in metres; smaller is invalid."""
    max_depth: float = 10.0
    """Largest depth in metres; larger is invalid in evaluation."""
    protocol: Literal["uvim", "eigen", "full"] = "uvim"
    """Evaluation crop, made before the model: uvim (54:480, 41:601), eigen (45:471, 41:601), full (none, any size)."""
    missing: Literal["bin0", "void"] = "bin0"
    """Invalid pixels: bin 0, seen by the oracle but without loss (the reference's), or void (-1, neither)."""
    decoding: Literal["argmax", "expectation"] = "argmax"
    """Depth of a pixel: the likeliest bin's centre (the reference's), or the mean of all centres under the softmax."""
    ground_truth: Literal["filled", "raw"] = "filled"
    """Which depth of the labelled .mat to use: in-filled (the reference's evaluation) or raw with holes."""
    image_dir: str = "images"
    """Own data: sub-folder of the images."""
    depth_dir: str = "depth"
    """Own data: sub-folder of the depth maps (16-bit PNG, .npy or .h5), of the same names."""
    depth_scale: float | None = None
    """Own data: stored units per metre (1000 for millimetres); null: 1000 for 16-bit PNG, 1 for npy and h5."""
