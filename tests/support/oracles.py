"""A small oracle's configuration, channels of both kinds, labels and images."""

from __future__ import annotations

import torch

from uvim_fsq.config.schema import OracleModelConfig, QuantizerConfig
from uvim_fsq.tasks.base import Categorical, Real

CONFIG = OracleModelConfig(
    patch_size=4,
    width=16,
    encoder_depth=1,
    decoder_depth=1,
    num_heads=2,
    mlp_dim=32,
    code_length=4,
    quantizer=QuantizerConfig(levels=(5, 5)),
)
CHANNELS = {"classes": Categorical(7), "reals": Real(2)}


def labels_of(seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    classes = torch.randint(-1, 7, (2, 16, 16), generator=g).to(torch.int16)
    return {"classes": classes, "reals": torch.rand(2, 16, 16, 2, generator=g) * 2 - 1}


def image_of(seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, 16, 16), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
