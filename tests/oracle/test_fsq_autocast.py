"""FSQ inside CUDA autocast."""

from __future__ import annotations

import pytest
import torch

from uvim_fsq.oracle.quantizers.fsq import FSQ


@pytest.mark.gpu
def test_fsq_inside_cuda_autocast() -> None:
    quantizer, z = FSQ([8, 6, 5]), torch.randn(64, 3) * 2
    with torch.autocast("cuda", dtype=torch.bfloat16):
        codes, indices = quantizer.cuda()(z.cuda())
    assert codes.dtype == torch.float32
    assert torch.equal(indices.cpu(), FSQ([8, 6, 5])(z)[1])
