"""Detects operators that make the host wait for a GPU, on any device."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class NoHostSync(TorchDispatchMode):
    """Refuses to read a value, and shapes that depend on values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masked = name in ("index", "index_put", "index_put_") and any(
            x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]
        )
        # In inference mode the first two appear as they are.
        waits = (
            "item",
            "is_nonzero",
            "_local_scalar_dense",
            "nonzero",
            "masked_select",
            "equal",
            "_unique2",
            "repeat_interleave",
        )
        assert name not in waits and not masked, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))
