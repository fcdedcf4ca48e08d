"""Images and arrays that claim, or unpack to, far more than their files hold are refused before memory is allocated."""

from __future__ import annotations

import warnings
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from tests.support.decompression import claim, peak, png
from uvim_fsq.data import images
from uvim_fsq.data.arrays import check_npz
from uvim_fsq.data.images import decode_png, limit_pixels, read_image, to_rgb
from uvim_fsq.errors import UserError
from uvim_fsq.inference.predictor import Predictor
from uvim_fsq.interop.published import read_npz
from uvim_fsq.tasks.coco_panoptic.data import PngStore, decode_ids, decode_prepared
from uvim_fsq.tasks.nyu_depth.files import read_depth_file

pytestmark = pytest.mark.usefixtures("default_pixel_limit")


@pytest.fixture(scope="module")
def bombs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of 300 million pixels in files of less than 5 MB."""
    folder = tmp_path_factory.mktemp("bombs")
    (folder / "rgb.png").write_bytes(png(20_000, 15_000))
    (folder / "gray.png").write_bytes(png(20_000, 15_000, colors=0))
    (folder / "deep.png").write_bytes(png(20_000, 15_000, 16, 0))
    assert max(file.stat().st_size for file in folder.iterdir()) < 5e6
    return folder


def test_an_image_with_too_many_pixels_is_never_decoded(bombs: Path) -> None:
    for work in (
        lambda: read_image(bombs / "rgb.png"),
        lambda: read_image(bombs / "deep.png"),
        lambda: read_depth_file(bombs / "deep.png"),
        lambda: decode_ids((bombs / "rgb.png").read_bytes(), "ids"),
        lambda: decode_prepared((bombs / "gray.png").read_bytes(), "prepared"),
        lambda: to_rgb(Image.open(bombs / "rgb.png")),
    ):
        assert peak(work) < 20
        with pytest.raises(
            UserError, match="20000 x 15000, 300 million pixels, but data.max_pixels allows 250 million"
        ):
            work()


def test_each_run_has_its_own_pixel_limit(tmp_path: Path, lm_dir: Path, oracle_dir: Path) -> None:
    file = tmp_path / "a.png"
    Image.new("RGB", (40, 30)).save(file)
    assert read_image(file).shape == (30, 40, 3)
    predictor = Predictor.from_run(lm_dir, ["data.max_pixels=1199"])
    with pytest.raises(UserError, match="1200"):
        predictor.predict(file)
    with pytest.raises(UserError, match="set data.max_pixels=1200"):
        predictor.predict(Image.open(file))
    with warnings.catch_warnings(record=True) as warned:
        limit_pixels(1000)
        with pytest.raises(UserError, match="40 x 30"):
            read_image(file)
    assert not warned, "Pillow's warning beside our line"
    # Pillow itself refuses images far above the limit.
    limit_pixels(100)
    with pytest.raises(UserError, match="more than twice the 0.0001 million pixels that data.max_pixels allows"):
        read_image(file)
    limit_pixels(1200)
    assert read_image(file).shape == (30, 40, 3)
    # The first run's limit applies again as soon as it is used.
    with pytest.raises(UserError, match="data.max_pixels=1200"):
        predictor.predict(file)


def test_evaluation_applies_the_pixel_limit(lm_dir: Path, oracle_dir: Path) -> None:
    from uvim_fsq.evaluation.run import evaluate

    with pytest.raises(UserError, match="32 x 24.*data.max_pixels=768"):
        evaluate(oracle_dir, ["data.max_pixels=767"])
    evaluate(oracle_dir, ["data.max_pixels=768"], limit=1)


def test_too_little_memory_for_an_image_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.png"
    Image.new("RGB", (40, 30)).save(file)

    def full(*_: object) -> np.ndarray:
        raise MemoryError

    monkeypatch.setattr(images, "to_rgb", full)
    with pytest.raises(UserError, match="a.png: not enough memory for 40 x 30 pixels"):
        read_image(file)
    monkeypatch.setattr(cv2, "imdecode", full)
    with pytest.raises(UserError, match="ids cannot be decoded: not enough memory for 40 x 30 pixels"):
        decode_png(file.read_bytes(), "ids")


@pytest.mark.slow
def test_npz_headers_are_checked_before_reading(tmp_path: Path) -> None:
    file = tmp_path / "a.npz"
    np.savez_compressed(file, a=np.zeros(30_000_000, np.float32))
    assert file.stat().st_size < 300_000
    assert peak(lambda: read_npz(file)) < 5
    with pytest.raises(UserError, match="would unpack to 120000"):
        read_npz(file)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.npy", claim((1 << 40,)))
    with pytest.raises(UserError, match="a.npz: a declares an array"):
        read_npz(file)
    np.savez(file, a=np.ones((3, 4), np.float32))
    check_npz(file)
    assert read_npz(file)["a"].shape == (3, 4)


def test_a_zipped_png_is_checked_before_reading(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("p/a.png", b"\0" * 50_000_000)
        archive.writestr("p/b.png", png(2, 2))
    store = PngStore(tmp_path / "a.zip", "p/")
    assert peak(lambda: store.read("a.png")) < 5
    assert store.read("b.png") == png(2, 2)
