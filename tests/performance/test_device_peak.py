"""The measured peak of a device."""

from __future__ import annotations

import torch

from uvim_fsq.performance.device_peak import matrix_rate

CPU = torch.device("cpu")


def test_measuring_the_peak_leaves_the_random_numbers_of_training_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    matrix_rate.cache_clear()
    assert matrix_rate(CPU, "fp32") > 1e8
    assert torch.equal(torch.rand(3), expected)
