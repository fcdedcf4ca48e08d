"""The keys under `task:` of imagenet_color. Knows nothing of torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ImagenetColorConfig:
    changeable = ("protocol", "inception_weights", "fid_reference", "keep_luma")

    protocol: Literal["psnr", "coltran", "fid"] = "psnr"
    """psnr: on the evaluation split at the model's size; coltran: FID-5k by the ColTran protocol on the two lists of
    5,000 of the ImageNet validation set; fid: the same steps on any evaluation split against fid_reference."""
    inception_weights: str = ""
    """Local file of torch-fidelity's weights-inception-2015-12-05-6726825d.pth, for the FID protocols."""
    fid_reference: str = "train"
    """Split whose photos are the reference set of protocol fid."""
    keep_luma: bool = False
    """Keep the photo's own brightness and take only the colour from the model; a variant that results name."""
