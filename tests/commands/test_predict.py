"""`uvim-fsq predict` on images of every mode."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.support.cli import failure
from tests.support.runs import sign_all
from uvim_fsq.cli import main
from uvim_fsq.inference.predictor import Predictor


def test_predict_reads_images_of_every_mode(tmp_path: Path, lm_dir: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    rgb = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    Image.fromarray(rgb).save(folder / "turned.jpg", exif=exif)
    Image.fromarray(rgb).convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(rgb).convert("L").save(folder / "gray.png")
    Image.fromarray(np.dstack([rgb, rgb[..., 0]])).save(folder / "alpha.png")
    Image.fromarray(rgb[..., 0].astype(np.uint16) * 257).save(folder / "deep.png")
    main(["predict", str(lm_dir), str(folder), "--out", str(tmp_path / "out")])
    written = {Path(w["image"]).stem: w for w in json.loads((tmp_path / "out" / "predictions.json").read_text())}
    assert set(written) == {"turned", "cmyk", "gray", "alpha", "deep"}
    for name, paths in written.items():
        meters = np.load(paths["npy"])
        assert meters.shape == ((30, 20) if name == "turned" else (20, 30)) and meters.dtype == np.float32
        with Image.open(paths["png"]) as picture:
            assert picture.info["depth_scale"] == "1000"
            np.testing.assert_allclose(np.asarray(picture) / 1000, meters, atol=0.00051)
    assert np.array_equal(Predictor.from_run(lm_dir).predict(folder / "gray.png"), np.load(written["gray"]["npy"]))


def test_an_lm_run_can_be_moved_without_its_oracle(tmp_path: Path, lm_dir: Path) -> None:
    import shutil

    shutil.copytree(lm_dir, tmp_path / "moved")
    config = next((tmp_path / "moved" / "checkpoints").glob("step_*")) / "config.yaml"
    tree = yaml.safe_load(config.read_text())
    config.write_text(yaml.safe_dump({**tree, "oracle": str(tmp_path / "gone")}))
    sign_all(tmp_path / "moved")
    assert Predictor.from_run(tmp_path / "moved").predict(np.zeros((9, 9, 3), np.uint8)).shape == (9, 9)


def test_a_long_setting_is_not_taken_for_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = failure(capsys, "predict", tmp_path / "none", "a.png", "task.ignore=" + "x" * 300, "--out", tmp_path)
    assert "a.png: no such file or folder" in said


def test_a_side_of_tiles_that_is_no_number_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["predict", "run", "a.png", "--tiles", "2^8", "--out", str(tmp_path)])
    assert "'2^8' is neither a number of pixels nor auto" in capsys.readouterr().err
