"""Shared by the panoptic tests: the task for a data set, and changes to its annotation file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from uvim_fsq.tasks.coco_panoptic.task import CocoPanoptic, CocoPanopticConfig

CONFIG = CocoPanopticConfig()


def task_for(root: Path, **options: Any) -> CocoPanoptic:
    return CocoPanoptic(CocoPanoptic.resolve_config(CocoPanopticConfig(**options), str(root)))


def edit(root: Path, change: Any, split: str = "val") -> None:
    """Applies `change` to the parsed annotation file."""
    file = root / f"annotations/panoptic_{split}2017.json"
    tree = json.loads(file.read_text())
    change(tree)
    file.write_text(json.dumps(tree))
