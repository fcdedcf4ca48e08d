"""uvim_fsq: dense prediction by discrete tokens (UViM, arXiv 2205.10337, with FSQ, arXiv 2309.15505).

The public names are imported when they are first used, so that `import uvim_fsq` takes no torch.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from uvim_fsq.version import __version__ as __version__

# Albumentations asks the network for updates on import unless this is set first.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

if TYPE_CHECKING:
    from uvim_fsq.evaluation.run import evaluate
    from uvim_fsq.inference.predictor import Predictor
    from uvim_fsq.oracle.quantizers.fsq import FSQ
    from uvim_fsq.tasks.base import Task
    from uvim_fsq.tasks.registry import register_task
    from uvim_fsq.training.run import train

_HOMES = {
    "FSQ": "uvim_fsq.oracle.quantizers.fsq",
    "Predictor": "uvim_fsq.inference.predictor",
    "Task": "uvim_fsq.tasks.base",
    "evaluate": "uvim_fsq.evaluation.run",
    "register_task": "uvim_fsq.tasks.registry",
    "train": "uvim_fsq.training.run",
}
__all__ = ["FSQ", "Predictor", "Task", "evaluate", "register_task", "train"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'uvim_fsq' has no attribute {name!r}; public names: {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
