"""Importing weights of an unknown task."""

from __future__ import annotations

from pathlib import Path

import pytest

from uvim_fsq.errors import UserError
from uvim_fsq.interop.import_uvim import import_oracle


def test_an_unknown_task_is_refused_before_the_file_is_read(tmp_path: Path) -> None:
    # The task is checked before the file, which may be large, is read.
    for task in ("nyu", "segmentation", "depht"):
        with pytest.raises(UserError, match=f"--task {task}: UViM published depth, panoptic, color; give one of these"):
            import_oracle(tmp_path / "none.npz", task, tmp_path / "out")
    for task in ("depth", "nyu_depth"):
        with pytest.raises(UserError, match="no such file"):
            import_oracle(tmp_path / "none.npz", task, tmp_path / "out")
