"""KITTI: raw drives, annotated depth maps, and the lists of the Eigen split."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from uvim_fsq.commands.data_check import check_data
from uvim_fsq.data.sample import Sample
from uvim_fsq.errors import UserError
from uvim_fsq.tasks.nyu_depth.data import detect, open_source
from uvim_fsq.tasks.nyu_depth.metrics import KITTI_FIGURES
from uvim_fsq.tasks.nyu_depth.task import NYUDepth, NYUDepthConfig

DRIVE = "2011_09_26_drive_0002_sync"
IMAGES, MAPS = f"2011_09_26/{DRIVE}/image_02/data", f"{DRIVE}/proj_depth/groundtruth/image_02"
BTS = "2011_09_26/{0}/image_02/data/{1:010d}.png {0}/proj_depth/groundtruth/image_02/{1:010d}.png 721.5377\n"


def stored(number: int) -> np.ndarray:
    """(4, 8) 16-bit values, sparse: 256 = 1 m."""
    values = np.zeros((4, 8), np.uint16)
    values[2, 1:5] = 256 * (number + 1) + 128
    return values


@pytest.fixture(scope="module")
def drives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Frames 0 to 9 of one drive; 3 to 6 have a depth map, 6 in the official part val."""
    root = tmp_path_factory.mktemp("kitti") / "kitti"
    (root / IMAGES).mkdir(parents=True)
    for number in range(10):
        Image.fromarray(np.full((4, 8, 3), number, np.uint8)).save(root / IMAGES / f"{number:010d}.png")
        if 3 <= number <= 6:
            folder = root / "data_depth_annotated" / ("val" if number == 6 else "train") / MAPS
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(stored(number)).save(folder / f"{number:010d}.png")
    return root


def frames(root: Path, split: str, **options: Any) -> list[int]:
    source = open_source(str(root), split, NYUDepthConfig(**options))
    return [int(source[i].id[-10:]) for i in range(len(source))]


def test_depth_is_sparse_and_in_units_of_1_256_meters(drives: Path) -> None:
    sample = open_source(str(drives), "train", NYUDepthConfig())[0]
    assert int(sample.image[0, 0, 0]) == 3 and sample.id == f"{IMAGES}/0000000003"
    np.testing.assert_array_equal(sample.maps["depth"], stored(3) / np.float32(256))


def test_of_two_files_of_a_frame_the_png_is_read(drives: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On every machine, whatever the order in which its disk lists them."""
    root = tmp_path / "kitti"
    shutil.copytree(drives, root)
    Image.new("RGB", (8, 4), "white").save(root / IMAGES / "0000000003.jpg")
    (root / IMAGES / "0000000003.txt").write_text("notes")
    listed = os.listdir
    for backwards in (False, True):
        monkeypatch.setattr(os, "listdir", lambda folder, order=backwards: sorted(listed(folder), reverse=order))
        sample = open_source(str(root), "train", NYUDepthConfig())[0]
        assert sample.id == f"{IMAGES}/0000000003" and sample.image.max() == 3


def test_the_official_parts_are_used_without_a_list(drives: Path) -> None:
    assert detect(drives) == detect(drives.parent) == ("KITTI", drives)
    assert frames(drives, "train") == [3, 4, 5] and frames(drives, "val") == [6]
    assert frames(drives, "holdout") == [3] and frames(drives, "train_minus_holdout") == [4, 5]


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("eigen_test_files_with_gt.txt", BTS),
        ("eigen_test_files_with_gt.txt", f"/{BTS}"),
        ("test_files.txt", "2011_09_26/{0} {1} l\n"),
        (
            "eigen_test_files.txt",
            "2011_09_26/{0}/image_02/data/{1:010d}.jpg 2011_09_26/{0}/image_03/data/{1:010d}.jpg\n",
        ),
    ],
)
def test_lists_of_the_eigen_split(drives: Path, tmp_path: Path, name: str, line: str) -> None:
    """Whatever part the depth maps are distributed in; frames without one are left out and counted."""
    root = tmp_path / "kitti"
    shutil.copytree(drives, root)
    (root / name).write_text("".join(line.format(DRIVE, number) for number in (0, 6, 4)))
    source = open_source(str(root), "val", NYUDepthConfig())
    assert frames(root, "val") == [6, 4]
    assert source.info["without_depth"] == 1 and source.info["layout"] == f"KITTI, {name}"


def test_a_list_may_say_that_there_is_no_depth_map(drives: Path, tmp_path: Path) -> None:
    file = tmp_path / "my_train.txt"
    none = f"{IMAGES}/0000000001.png None 721.5377\n"
    file.write_text(none + BTS.format(DRIVE, 5))
    assert frames(drives, "train", list_file=str(tmp_path / "my_{split}.txt")) == [5]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("../../etc/passwd ../../x 1\n", "lies outside of the data set"),
        ("only_one\n", "is not `image depth focal` or `drive frame side`"),
        ("a/b.png c.png\n", "does not name an image as DATE/DRIVE/image_02/data/NAME"),
        (f"{IMAGES}/0000000001.png None 721.5377\n", "lists no image with a depth map"),
        (None, "cannot be read"),
    ],
)
def test_a_wrong_list_is_said(drives: Path, tmp_path: Path, text: str | None, message: str) -> None:
    file = tmp_path / "list.txt"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=message):
        open_source(str(drives), "val", NYUDepthConfig(list_file=str(file)))


def test_data_check_names_a_missing_image(drives: Path, tmp_path: Path) -> None:
    root = tmp_path / "kitti"
    shutil.copytree(drives, root)
    (root / IMAGES / "0000000006.png").unlink()
    lines, ok = check_data("nyu_depth", str(root), ["task.protocol=kitti_garg"])
    assert not ok and any("val: " in line and "0000000006.png: no such image file" in line for line in lines)


def kitti_metric(protocol: Any, **options: Any) -> Any:
    task: Any = NYUDepth(NYUDepthConfig(protocol=protocol, max_depth=80.0, **options))
    return task.metric([])


@pytest.mark.parametrize(
    ("protocol", "rows", "columns"), [("kitti_garg", (153, 371), (44, 1197)), ("kitti_eigen", (124, 342), (44, 1197))]
)
def test_only_pixels_inside_of_the_crop_are_scored(
    protocol: Any, rows: tuple[int, int], columns: tuple[int, int]
) -> None:
    """The published crops at KITTI's usual size, 375 x 1242; the model sees all of the image."""
    truth = np.full((375, 1242), 20, np.float32)
    sample = Sample("x", np.zeros((375, 1242, 3), np.uint8), {"depth": truth})
    task = NYUDepth(NYUDepthConfig(protocol=protocol, max_depth=80.0))
    assert task.evaluation_view(sample) is sample
    row = kitti_metric(protocol).update(np.full((4, 4), 20.0), sample)
    assert row["valid_pixels"] == (rows[1] - rows[0]) * (columns[1] - columns[0]) and row["rmse"] == 0
    truth[: rows[0]] = truth[rows[1] :] = truth[:, : columns[0]] = truth[:, columns[1] :] = 0
    assert kitti_metric(protocol).update(np.full((4, 4), 20.0), sample)["valid_pixels"] == row["valid_pixels"]


def test_figures_equal_values_computed_by_hand() -> None:
    truth = np.zeros((100, 100), np.float32)
    truth[60, 50:54] = (10, 40, 79, 81)  # beyond 80 m: not scored
    sample = Sample("x", np.zeros((100, 100, 3), np.uint8), {"depth": truth})
    prediction = np.full((100, 100), 20.0)
    prediction[60, 52] = 500  # clamped to 80
    figures = kitti_metric("kitti_garg")
    row = figures.update(prediction, sample)
    logs = np.log([2, 0.5, 80 / 79])
    assert row == pytest.approx(
        {
            **{name: row[name] for name in KITTI_FIGURES[2:6]},
            "valid_pixels": 3,
            "rmse": np.sqrt((100 + 400 + 1) / 3),
            "abs_rel": (1 + 0.5 + 1 / 79) / 3,
            "sq_rel": (10 + 10 + 1 / 79) / 3,
            "rmse_log": np.sqrt(np.mean(logs**2)),
            "silog": 100 * np.std(logs),
        }
    )
    assert set(KITTI_FIGURES) <= set(figures.compute())


def test_the_cap_is_part_of_the_protocols_name() -> None:
    assert kitti_metric("kitti_eigen").protocol == "nyu_depth/kitti_eigen"
    metric = kitti_metric("kitti_garg", max_eval_depth=50.0)
    assert metric.protocol == "nyu_depth/kitti_garg_50m" and metric.max_depth == 50
    with pytest.raises(UserError, match="task.max_eval_depth=0.0: must be above 0.001"):
        kitti_metric("kitti_garg", max_eval_depth=0.0)


def test_far_depths_are_saved_in_kittis_unit(tmp_path: Path) -> None:
    """In millimeters, 16 bits end at 65.5 m."""
    task = NYUDepth(NYUDepthConfig(protocol="kitti_garg", max_depth=80.0))
    paths = task.save_prediction(np.full((2, 2), 79.5), np.zeros((2, 2, 3), np.uint8), str(tmp_path / "x"))
    with Image.open(paths["png"]) as png:
        assert np.asarray(png).tolist() == [[79.5 * 256] * 2] * 2
        assert png.info["depth_scale"] == "256" and png.info["unit"] == "1/256 meter"
