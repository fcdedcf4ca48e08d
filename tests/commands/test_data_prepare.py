"""`uvim-fsq data prepare` on a full disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.commands import command
from uvim_fsq.commands.data_check import check_data
from uvim_fsq.synthetic.writers import write_dataset


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "task"), [("nyu", "nyu_depth"), ("coco_panoptic", "coco_panoptic")])
def test_preparation_continues_after_a_full_disk(tmp_path: Path, kind: str, task: str) -> None:
    """Finished files are kept; the rest is written once there is space."""
    write_dataset(kind, tmp_path / "set", 3, (24, 32), num_val=1, layout="png", workers=1)
    prepare = ["data", "prepare", str(tmp_path / "set"), "--task", task]
    for limit, code, message in ((100, 2, "error: cannot write"), (None, 0, "")):
        process = command(*prepare, limit=limit)
        _, said = process.communicate(timeout=300)
        assert process.returncode == code and "Traceback" not in said and message in said
        assert not list(tmp_path.rglob("*.partial"))
    lines, ok = check_data(task, str(tmp_path / "set"))
    assert ok and sum("prepared" in line for line in lines) == 2
