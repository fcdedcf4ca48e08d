"""Layers shared by oracle and LM."""

from __future__ import annotations

import torch

from uvim_fsq.layers import patchify, unpatchify


def test_unpatchify_inverts_patchify() -> None:
    x = torch.randn(2, 16, 16, 3)
    assert torch.equal(unpatchify(patchify(x, 4), 4), x)
