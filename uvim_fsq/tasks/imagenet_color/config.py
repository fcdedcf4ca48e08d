"""The keys under `task:` of imagenet_color. Does not import torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ImagenetColorConfig:
    """The keys under `task:` of colorization."""

    changeable = (
        "protocol",
        "inception_weights",
        "fid_reference",
        "features",
        "features_weights",
        "features_reference",
        "keep_luma",
        "image_column",
    )

    protocol: Literal["psnr", "coltran", "fid"] = "psnr"
    """psnr: PSNR on the evaluation split at model size; coltran: FID-5k by the ColTran protocol, on two fixed lists of
    5,000 ImageNet validation photos; fid: FID computed likewise, for any evaluation split against fid_reference."""
    inception_weights: str = ""
    """Path of torch-fidelity's weights-inception-2015-12-05-6726825d.pth, for the protocols coltran and fid."""
    fid_reference: str = "train"
    """Split whose photos are the reference set of protocol fid, and of the distance in other features."""
    features: str = ""
    """Also report the Fréchet distance to fid_reference in the features of this timm model, named fd_MODEL."""
    features_weights: str = "hub"
    """Weights of that model: hub (timm's published ones), package (tf_efficientnet_lite0 from the package of
    uvim-fsq[pretrained]), or the path of a local .safetensors / .npz / .pth file."""
    features_reference: int = 5000
    """Photos of fid_reference, evenly spaced, that this distance is computed against; 0: all."""
    keep_luma: bool = False
    """Keep the luma of the photo and take only the chroma from the model; results name this variant."""
    image_column: str = "image"
    """Data saved by the library datasets: column of the photos."""
