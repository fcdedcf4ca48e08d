"""Folders of the user's own depth data, and common mistakes in them."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.support.small import small_data
from uvim_fsq.commands.data_check import check_data
from uvim_fsq.data.decoded import keep_decoded
from uvim_fsq.errors import UserError
from uvim_fsq.tasks.nyu_depth.data import open_source
from uvim_fsq.tasks.nyu_depth.task import NYUDepth, NYUDepthConfig

CONFIG = NYUDepthConfig(protocol="full")


@pytest.mark.parametrize("above", [False, True])
@pytest.mark.parametrize(
    ("change", "split", "message"),
    [
        (("train", "training"), "train", "found training/ and val/, but no train/: rename training/ to train/"),
        (("train", "TRAIN"), "train", "found TRAIN/ and val/, but no train/: rename TRAIN/ to train/"),
        (("train", None), "train", "found val/, but no train/: add train/"),
        (("train", None), "holdout", "found val/, but no train/"),
        (("val", "validation"), "val", "found train/ and validation/, but no val/: rename validation/ to val/"),
        (("val", "test"), "val", "found test/ and train/, but no val/: rename test/ to val/"),
        (("train/depth", None), "train", "train holds images/, but no depth/; set task.depth_dir"),
        (("train/depth", "train/depths"), "train", "train holds depths/ and images/, but no depth/; set"),
        (
            ("train/images", "train/rgb"),
            "train",
            "train holds depth/ and rgb/, but no images/; set task",
        ),
    ],
)
def test_a_misnamed_folder_is_named_with_the_expected_name(
    own_depth_folder: Path, above: bool, change: tuple[str, str | None], split: str, message: str
) -> None:
    """Otherwise val/ could be taken for the whole data set."""
    old, new = change
    if new is None:
        shutil.rmtree(own_depth_folder / old)
    else:
        (own_depth_folder / old).rename(own_depth_folder / new)
    with pytest.raises(UserError, match=message):
        open_source(str(own_depth_folder.parent if above and "/" not in old else own_depth_folder), split, CONFIG)


def test_two_misnamed_folders_and_no_depth_data(own_depth_folder: Path) -> None:
    (own_depth_folder / "train").rename(own_depth_folder / "training")
    (own_depth_folder / "val").rename(own_depth_folder / "validation")
    with pytest.raises(UserError, match="found training/ and validation/, but no train/: rename training/ to train/"):
        open_source(str(own_depth_folder), "val", CONFIG)
    lines, ok = check_data("nyu_depth", str(own_depth_folder), ["task.protocol=full"])
    assert not ok and all("no train/" in line for line in lines)
    shutil.rmtree(own_depth_folder / "training")
    (own_depth_folder / "validation").rename(own_depth_folder / "other")
    shutil.rmtree(own_depth_folder / "other/depth")
    with pytest.raises(UserError, match="no depth data found"):
        open_source(str(own_depth_folder), "val", CONFIG)


@pytest.mark.parametrize("name", ["training", "Train"])
def test_a_misnamed_folder_of_the_fastdepth_layout(tmp_path: Path, name: str) -> None:
    data = small_data(tmp_path / "set", num=3, num_val=2) / "nyudepthv2"
    (data / "train").rename(data / name)
    with pytest.raises(UserError, match=f"but no train/: rename {name}/ to train/"):
        open_source(str(data), "train", CONFIG)
    assert len(open_source(str(data), "val", CONFIG)) == 2


def test_the_validation_split_alone_can_be_used(own_depth_folder: Path) -> None:
    shutil.rmtree(own_depth_folder / "train")
    assert len(open_source(str(own_depth_folder), "val", CONFIG)) == 4
    assert len(open_source(str(own_depth_folder.parent), "val", CONFIG)) == 4


@pytest.mark.parametrize("folder", ["images", "depth"])
def test_two_files_with_the_same_name_are_refused(own_depth_folder: Path, folder: str) -> None:
    first = sorted((own_depth_folder / "train" / folder).iterdir())[0]
    shutil.copy(first, first.with_suffix(".png"))
    with pytest.raises(UserError, match=f"{first.name} and train0.png have the same name"):
        open_source(str(own_depth_folder), "train", CONFIG)


def test_data_check_reports_two_samples_with_the_same_name(tmp_path: Path) -> None:
    root = small_data(tmp_path / "set", num=3, num_val=1, layout="png")
    (listed,) = root.glob("*train*files*.txt")
    listed.write_text(listed.read_text() + listed.read_text().splitlines()[1] + "\n")
    lines, ok = check_data("nyu_depth", str(root), ["task.protocol=full"])
    assert not ok and any("samples 2 and 4 are both room_0001a/rgb_00001.jpg" in line for line in lines)


@pytest.mark.parametrize("scale", [0.0, -1000.0, float("nan"), float("inf")])
def test_an_impossible_depth_scale_is_refused(scale: float) -> None:
    """0 must not be read as null."""
    with pytest.raises(UserError, match="task.depth_scale=.* a number above 0"):
        NYUDepth(NYUDepthConfig(depth_scale=scale))


def test_another_depth_scale_is_not_taken_from_decoded_files(own_depth_folder: Path, tmp_path: Path) -> None:
    with keep_decoded(str(tmp_path / "kept")):
        one, half = (
            open_source(str(own_depth_folder), "train", NYUDepthConfig(protocol="full", depth_scale=scale))[0]
            for scale in (1.0, 2.0)
        )
    np.testing.assert_array_equal(half.maps["depth"], one.maps["depth"] / 2)
    np.testing.assert_array_equal(half.image, one.image)
