"""Errors of too little memory become user errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from uvim_fsq.errors import UserError, enough_memory


def test_allocations_that_are_too_large_are_user_errors() -> None:
    for allocate in (
        lambda: torch.empty(10**14),
        lambda: nn.Linear(10**15, 10**15),
        lambda: np.empty(10**15),
    ):
        with pytest.raises(UserError, match="not enough memory .*; buy more") as caught, enough_memory("buy more"):
            allocate()
        assert "\n" not in str(caught.value)
    for other in (RuntimeError("shapes differ"), KeyError("out of memory")):
        with pytest.raises(type(other)), enough_memory(""):
            raise other
