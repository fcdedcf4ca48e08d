"""File names in NYU lists never lead out of the data set."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.small import small_data
from uvim_fsq.errors import UserError
from uvim_fsq.tasks.nyu_depth.config import NYUDepthConfig
from uvim_fsq.tasks.nyu_depth.data import open_source as open_depth


def test_a_depth_list_cannot_name_files_outside(tmp_path: Path) -> None:
    root = small_data(tmp_path / "png", num=4, num_val=2, layout="png")
    lists = root / "nyudepthv2_test_files_with_gt.txt"
    rgb, depth, focal = lists.read_text().splitlines()[0].split()
    assert len(open_depth(str(root), "val", NYUDepthConfig())) == 2
    for line in (f"../{rgb} {depth} {focal}", f"{rgb} x/../../{depth} {focal}", f"/{rgb} C:\\{depth} {focal}"):
        lists.write_text(line + "\n")
        with pytest.raises(UserError, match="test_files_with_gt.txt lists the file .* lies outside of the data set"):
            open_depth(str(root), "val", NYUDepthConfig())
    lists.write_text(f"/{rgb} //{depth} {focal}\n")  # the published lists have leading slashes
    assert len(open_depth(str(root), "val", NYUDepthConfig())) == 1
    lists.write_bytes(f"{rgb} {depth} {focal}\nscene\xe9.jpg {depth} {focal}\n".encode("latin-1"))
    assert len(open_depth(str(root), "val", NYUDepthConfig())) == 2
