"""Prepared HDF5 files hold the same images; they follow changes of their sources."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tests.support.small import small_data
from uvim_fsq.commands.data_check import check_data
from uvim_fsq.errors import UserError
from uvim_fsq.tasks.nyu_depth.data import open_source, prepare
from uvim_fsq.tasks.nyu_depth.task import NYUDepthConfig

CONFIG = NYUDepthConfig(protocol="full")


@pytest.mark.slow
@pytest.mark.parametrize("own", [False, True])
def test_prepared_images_equal_their_sources(tmp_path: Path, own: bool) -> None:
    root = small_data(tmp_path / "data", num=21, num_val=2, layout="png")
    if own:  # the same files as a user's own folder, without splits
        for kind, pattern in (("images", "rgb_*.jpg"), ("depth", "*depth_*.png")):
            (root / kind).mkdir()
            for i, file in enumerate(sorted(root.rglob(pattern))):
                file.rename(root / kind / f"{i:02d}{file.suffix}")
        for folder in ("sync", "official_splits"):
            shutil.rmtree(root / folder)
    config = NYUDepthConfig(protocol="full", depth_scale=500.0 if own else None)
    splits = ("train", "val", "holdout", "train_minus_holdout")
    before = [open_source(str(root), split, config) for split in splits]
    seen: list[tuple[int, int]] = []
    assert prepare(str(root), config, lambda done, total: seen.append((done, total))).startswith("23 images")
    assert (23, 23) in seen and not list(root.rglob("*.partial"))
    for split, source in zip(splits, before, strict=True):
        after = open_source(str(root), split, config)
        assert len(after) == len(source) > 0 and after.info["layout"].endswith("(prepared)")
        assert {file.suffix for _, *files in after.pairs for file in files} == {".h5"}
        for i in range(len(source)):
            assert after[i].id == source[i].id
            np.testing.assert_array_equal(after[i].image, source[i].image)
            np.testing.assert_array_equal(after[i].maps["depth"], source[i].maps["depth"])
    assert prepare(str(root), config, lambda done, total: None).startswith("all 23 images are in")
    scale = f"task.depth_scale={config.depth_scale or 'null'}"
    assert "(prepared)" in check_data("nyu_depth", str(root), ["task.protocol=full", scale])[0][0]


def test_prepared_images_of_changed_files_are_not_used(tmp_path: Path) -> None:
    root = small_data(tmp_path / "data", num=6, num_val=1, layout="png")
    prepare(str(root), CONFIG, lambda done, total: None)
    pngs = sorted(root.glob("sync/**/*.png"))
    with Image.open(pngs[2]) as image:
        depth = np.asarray(image) // 2 + 1
    Image.fromarray(depth.astype(np.uint16)).save(pngs[2])
    pngs[4].write_bytes(b"broken")
    source = open_source(str(root), "train", CONFIG)
    assert source.info["layout"] == "C (4 of 6 prepared)"
    np.testing.assert_allclose(source[2].maps["depth"], depth / 1000, rtol=1e-6)
    said = prepare(str(root), CONFIG, lambda done, total: None)
    assert said.startswith("1 images") and "1 were skipped, the first: " in said and pngs[4].name in said
    assert open_source(str(root), "train", CONFIG).info["layout"] == "C (5 of 6 prepared)"
    other = NYUDepthConfig(protocol="full", depth_scale=500.0)
    assert (
        open_source(str(root), "train", other).info["layout"] == "C (5 of 6 prepared)"
    )  # the scale applies to own data only
    shutil.rmtree(root / "official_splits")
    for file in root.glob("*test_files*.txt"):
        file.unlink()
    said = prepare(str(root), CONFIG, lambda done, total: None)
    assert said.startswith("0 images") and "; val was skipped: " in said and "holds no rgb" in said


def test_an_interrupted_preparation_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = small_data(tmp_path / "data", num=6, num_val=1, layout="png")

    def stop(done: int, total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(str(root), CONFIG, stop)
    assert open_source(str(root), "train", CONFIG).info["layout"] == "C (4 of 6 prepared)"
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1))
    with pytest.raises(UserError, match="has 0.00 GB free, but 0.00 GB are needed"):
        prepare(str(root), CONFIG, lambda done, total: None)
    monkeypatch.undo()
    assert prepare(str(root), CONFIG, lambda done, total: None).startswith("3 images")
    assert open_source(str(root), "train", CONFIG).info["layout"] == "C (prepared)"


def test_data_that_cannot_be_prepared_is_refused(tmp_path: Path) -> None:
    root = small_data(tmp_path / "data", num=3, num_val=1, layout="png")
    prepare(str(root), CONFIG, lambda done, total: None)
    for file in (root / "prepared_depth").rglob("*.h5"):
        file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(UserError, match="rgb_.*h5 cannot be read .* delete .*prepared_depth and"):
        open_source(str(root), "val", CONFIG)[0]
    (root / "prepared_depth" / "contents.json").write_text("{")
    with pytest.raises(UserError, match=r"contents.json is damaged .*; delete .*prepared_depth"):
        open_source(str(root), "val", CONFIG)
    with pytest.raises(UserError, match="HDF5 already .layout B.*nothing to prepare"):
        prepare(str(small_data(tmp_path / "h5", num=2, num_val=1)), CONFIG, lambda done, total: None)
    for folder in ("photos", "mine/depth"):
        (tmp_path / folder).mkdir(parents=True)
    Image.fromarray(np.zeros((8, 12, 3), np.uint8)).save(tmp_path / "photos" / "a.png")
    np.save(tmp_path / "mine" / "depth" / "a.npy", np.ones((8, 12), np.float32))
    for place in ("../photos", str(tmp_path / "photos")):
        with pytest.raises(UserError, match="a.png is outside of .*mine; only data inside"):
            outside = NYUDepthConfig(protocol="full", image_dir=place)
            prepare(str(tmp_path / "mine"), outside, lambda done, total: None)
