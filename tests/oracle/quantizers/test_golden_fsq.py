"""FSQ gives the reference's codes, indices and gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.support.golden import golden
from uvim_fsq.oracle.quantizers.fsq import FSQ


def _fsq_levels() -> list[str]:
    return sorted({name.split("/")[1] for name in golden("pipeline.npz") if name.startswith("fsq/")})


@pytest.mark.filterwarnings("ignore:FSQ levels")
@pytest.mark.parametrize("levels", _fsq_levels())
def test_fsq_equals_the_reference(levels: str) -> None:
    arrays = golden("pipeline.npz")
    quantizer = FSQ([int(level) for level in levels.split("x")])
    z = torch.tensor(arrays[f"fsq/{levels}/z"], requires_grad=True)
    codes, indices, *_ = quantizer(z)
    (codes * torch.arange(1, quantizer.dim + 1)).sum().backward()
    np.testing.assert_allclose(codes.detach().numpy(), arrays[f"fsq/{levels}/zhat"], atol=1e-6)
    np.testing.assert_array_equal(indices.numpy(), arrays[f"fsq/{levels}/index"])
    assert z.grad is not None
    np.testing.assert_allclose(z.grad.numpy(), arrays[f"fsq/{levels}/grad"], atol=1e-5)
