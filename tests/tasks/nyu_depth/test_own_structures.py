"""Depth data in the folders of scenes (ScanNet), and in files next to the images (DIODE)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from uvim_fsq.errors import UserError
from uvim_fsq.tasks.nyu_depth.data import detect, open_source, prepare
from uvim_fsq.tasks.nyu_depth.task import NYUDepthConfig

SCANNET = NYUDepthConfig(protocol="full", image_dir="color")


def ids(root: Path, split: str, config: NYUDepthConfig) -> list[str]:
    source = open_source(str(root), split, config)
    return [source[i].id for i in range(len(source))]


@pytest.fixture
def diode(tmp_path: Path) -> Path:
    """DIODE's tree: depth (H, W, 1) in meters and a mask (H, W), both .npy, next to each image."""
    for part in ("train", "val"):
        folder = tmp_path / "diode" / part / "indoors/scene_00019/scan_00183"
        folder.mkdir(parents=True)
        for i in range(2):
            stem = folder / f"00019_00183_indoors_{i:03d}_010"
            Image.new("RGB", (6, 4)).save(f"{stem}.png")
            np.save(f"{stem}_depth.npy", np.full((4, 6, 1), 2.5 + i, np.float32))
            mask = np.ones((4, 6))
            mask[0] = 0
            np.save(f"{stem}_depth_mask.npy", mask)
    return tmp_path / "diode"


@pytest.fixture
def scannet(tmp_path: Path) -> Path:
    """Three scenes of two frames; the photos are twice as large as the depth maps."""
    for scene in range(3):
        for i in range(2):
            folder = tmp_path / f"scannet/scene{scene:04d}_00"
            for kind in ("color", "depth"):
                (folder / kind).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (12, 10)).save(folder / f"color/{i}.jpg")
            depth = np.full((5, 6), 1500, np.uint16)
            Image.fromarray(depth).save(folder / f"depth/{i}.png")
    return tmp_path / "scannet"


def test_diode_is_found_and_its_masks_apply(diode: Path) -> None:
    assert detect(diode) == detect(diode.parent) == ("folder", diode)
    source = open_source(str(diode), "train", NYUDepthConfig(protocol="full"))
    assert len(source) == 2 and source[1].id == "indoors/scene_00019/scan_00183/00019_00183_indoors_001_010"
    np.testing.assert_array_equal(source[1].maps["depth"], np.repeat([[0.0], [3.5], [3.5], [3.5]], 6, axis=1))
    assert len(ids(diode, "val", NYUDepthConfig(protocol="full"))) == 2


def test_scenes_named_by_dates_are_not_kitti(scannet: Path) -> None:
    for number, scene in enumerate(sorted(scannet.iterdir())):
        scene.rename(scannet / f"2024_05_{number:02d}")
    assert detect(scannet, SCANNET) == ("folder", scannet)


def test_a_mask_may_be_a_picture_in_the_folder_of_the_depth_maps(own_depth_folder: Path) -> None:
    mask = np.zeros((24, 32), np.uint8)
    mask[5] = 255
    Image.fromarray(mask).save(own_depth_folder / "val/depth/val1_mask.png")
    source = open_source(str(own_depth_folder), "val", NYUDepthConfig(protocol="full"))
    assert [np.count_nonzero(source[i].maps["depth"]) for i in range(2)] == [24 * 32, 32]
    Image.fromarray(mask[:4]).save(own_depth_folder / "val/depth/val1_mask.png")
    with pytest.raises(UserError, match=r"val1_mask.png is \(4, 32\), but its depth map \(24, 32\)"):
        source[1]
    (own_depth_folder / "val/depth/val1_mask.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="val1_mask.png cannot be read as a mask"):
        source[1]


def test_a_changed_mask_is_prepared_again(diode: Path) -> None:
    config = NYUDepthConfig(protocol="full")
    prepare(str(diode), config, lambda done, total: None)
    assert "prepared" in open_source(str(diode), "val", config).info["layout"]
    file, _ = sorted((diode / "val").rglob("*_mask.npy"))
    np.save(file, np.ones((4, 6), np.float32))
    source = open_source(str(diode), "val", config)
    assert "1 of 2 prepared" in source.info["layout"] and np.all(source[0].maps["depth"] == 2.5)


def test_scenes_are_divided_as_wholes(scannet: Path) -> None:
    assert detect(scannet, SCANNET) == ("folder", scannet)
    assert ids(scannet, "val", SCANNET) == ["scene0000_00/0", "scene0000_00/1"]
    assert len(ids(scannet, "train", SCANNET)) == 4
    assert ids(scannet, "holdout", SCANNET) == ["scene0001_00/0", "scene0001_00/1"]
    assert ids(scannet, "train_minus_holdout", SCANNET) == ["scene0002_00/0", "scene0002_00/1"]


def test_a_list_names_scenes_or_images(scannet: Path) -> None:
    config = NYUDepthConfig(protocol="full", image_dir="color", list_file="scannetv2_{split}.txt")
    (scannet / "scannetv2_train.txt").write_text("scene0002_00\nscene0000_00/1\n")
    (scannet / "scannetv2_val.txt").write_text("scene0001_00\n")
    assert ids(scannet, "train", config) == ["scene0000_00/1", "scene0002_00/0", "scene0002_00/1"]
    assert ids(scannet, "val", config) == ["scene0001_00/0", "scene0001_00/1"]
    (scannet / "scannetv2_val.txt").write_text("scene0009_00\n")
    with pytest.raises(UserError, match="lists 'scene0009_00', but there is no image or scene of that name"):
        open_source(str(scannet), "val", config)


def test_a_larger_photo_gets_the_size_of_its_depth_map(scannet: Path) -> None:
    sample = open_source(str(scannet), "val", SCANNET)[0]
    assert sample.image.shape == (5, 6, 3) and np.all(sample.maps["depth"] == 1.5)
    Image.new("RGB", (26, 10)).save(scannet / "scene0000_00/color/0.jpg")
    with pytest.raises(UserError, match="differ in size"):
        open_source(str(scannet), "val", SCANNET)[0]


def test_an_image_without_its_depth_map_is_named(diode: Path, scannet: Path) -> None:
    next((diode / "val").rglob("*_depth.npy")).unlink()
    with pytest.raises(UserError, match="val: 1 images have no depth map, the first would be indoors/.*_depth.npy"):
        open_source(str(diode), "val", NYUDepthConfig(protocol="full"))
    (scannet / "scene0001_00/depth/0.png").unlink()
    with pytest.raises(UserError, match="scene0001_00/depth: 1 images have no depth map, the first is 0"):
        open_source(str(scannet), "train", SCANNET)
