"""Records the size of the largest tensor that any operator makes."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class LargestTensor(TorchDispatchMode):
    """`numbers`: elements of the largest tensor made inside, except for tensors of the `ignored` shapes."""

    def __init__(self, *ignored: torch.Size) -> None:
        super().__init__()
        self.numbers, self.ignored = 0, ignored

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.is_view:
            return out
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor) and x.shape not in self.ignored:
                self.numbers = max(self.numbers, x.numel())
        return out
