"""The keys under `task:` of nyu_depth. Does not import torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class NYUDepthConfig:
    """The keys under `task:` of depth prediction."""

    changeable = (
        *("protocol", "max_eval_depth", "decoding", "ground_truth"),
        *("image_dir", "depth_dir", "depth_scale", "list_file", "image_column", "depth_column"),
    )

    num_bins: int = 256
    """Number of linear depth bins between min_depth and max_depth."""
    min_depth: float = 0.001
    """Smallest depth in meters; smaller values are invalid."""
    max_depth: float = 10.0
    """Largest depth in meters; larger values are invalid in evaluation."""
    protocol: Literal["uvim", "eigen", "full", "kitti_garg", "kitti_eigen"] = "uvim"
    """Evaluation crop, applied before the model: uvim (54:480, 41:601), eigen (45:471, 41:601) or full (any size); or
    scored pixels of the whole image: kitti_garg (Garg's crop, up to 80 m) or kitti_eigen (Eigen's)."""
    max_eval_depth: float | None = None
    """Only depths below this many meters are scored; null: 10 for uvim and eigen, 80 for KITTI, max_depth for full."""
    missing: Literal["bin0", "void"] = "bin0"
    """Invalid pixels: bin 0, seen by the oracle but without loss (as in the reference), or void (-1, neither)."""
    decoding: Literal["argmax", "expectation"] = "argmax"
    """Depth: center of the most likely bin (as in the reference) or softmax-weighted mean of all centers."""
    ground_truth: Literal["filled", "raw"] = "filled"
    """Depth maps of the labeled .mat to use: filled in (as in the reference's evaluation) or raw, with holes."""
    image_dir: str = "images"
    """Your own data: folder of the images, in the root, in train/ and val/, or in the folder of each scene."""
    depth_dir: str = "depth"
    """Your own data: folder of the depth maps (16-bit PNG, .npy or .h5), named like the images."""
    depth_scale: float | None = None
    """Your own data: stored units per meter (1000 for millimeters); null: 1000 for 16-bit PNG, 1 for npy and h5."""
    list_file: str = ""
    """KITTI, your own data: file that lists the images or scenes of a split, relative to data.root; {split} becomes
    train or val."""
    image_column: str = "image"
    """Data saved by the library datasets: column of the images."""
    depth_column: str = "depth_map"
    """Likewise, column of the depth maps: pictures, or arrays in meters."""
