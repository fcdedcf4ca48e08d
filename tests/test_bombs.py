"""Pictures and arrays that claim, or are, far more than their files: one line each, before memory is asked for."""

from __future__ import annotations

import struct
import tracemalloc
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import h5py
import numpy as np
import pytest
from PIL import Image

from uvim_fsq.config.schema import DataConfig
from uvim_fsq.data import images
from uvim_fsq.data.arrays import check_npz
from uvim_fsq.data.images import decode_png, limit_pixels, read_image, to_rgb
from uvim_fsq.errors import UserError
from uvim_fsq.inference.predictor import Predictor
from uvim_fsq.interop.published import read_npz
from uvim_fsq.tasks.coco_panoptic.data import PngStore, decode_ids, decode_prepared
from uvim_fsq.tasks.nyu_depth.data import LabelledMat
from uvim_fsq.tasks.nyu_depth.files import PairSource, read_depth_file
from uvim_fsq.tasks.nyu_depth.task import colour


@pytest.fixture(autouse=True)
def default_limit() -> Iterator[None]:
    limit_pixels(DataConfig.max_pixels)
    yield
    limit_pixels(DataConfig.max_pixels)


def png(width: int, height: int, depth: int = 8, colours: int = 2) -> bytes:
    """A PNG of zeros whose pixels are there in truth: their rows compress a thousandfold."""
    channels = {0: 1, 2: 3}[colours]
    row = b"\0" * (1 + width * channels * depth // 8)
    packer = zlib.compressobj(1)
    body = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, 0)
    return images._PNG + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def peak(work: Callable[[], object]) -> float:
    """Peak of Python's and NumPy's memory in MB while a call raises UserError."""
    tracemalloc.start()
    try:
        with pytest.raises(UserError) as caught:
            work()
        assert "\n" not in str(caught.value)
        return tracemalloc.get_traced_memory()[1] / 1e6
    finally:
        tracemalloc.stop()


@pytest.fixture(scope="module")
def bombs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of 300 million pixels, in files below 2 MB."""
    folder = tmp_path_factory.mktemp("bombs")
    (folder / "rgb.png").write_bytes(png(20_000, 15_000))
    (folder / "grey.png").write_bytes(png(20_000, 15_000, colours=0))
    (folder / "deep.png").write_bytes(png(20_000, 15_000, 16, 0))
    assert max(file.stat().st_size for file in folder.iterdir()) < 5e6
    return folder


def test_a_picture_of_too_many_pixels_is_never_decoded(bombs: Path) -> None:
    for work in (
        lambda: read_image(bombs / "rgb.png"),
        lambda: read_image(bombs / "deep.png"),
        lambda: read_depth_file(bombs / "deep.png"),
        lambda: decode_ids((bombs / "rgb.png").read_bytes(), "ids"),
        lambda: decode_prepared((bombs / "grey.png").read_bytes(), "prepared"),
        lambda: to_rgb(Image.open(bombs / "rgb.png")),
    ):
        assert peak(work) < 20
        with pytest.raises(
            UserError, match="20000 x 15000, 300 million pixels, but data.max_pixels allows 250 million"
        ):
            work()


def test_the_limit_is_the_runs_own(tmp_path: Path, lm_dir: Path, oracle_dir: Path) -> None:
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
    # Far above the limit Pillow itself refuses.
    limit_pixels(100)
    with pytest.raises(UserError, match="more than twice the 0.0001 million pixels that data.max_pixels allows"):
        read_image(file)
    limit_pixels(1200)
    assert read_image(file).shape == (30, 40, 3)
    # Another run's limit holds again as soon as it is used.
    with pytest.raises(UserError, match="data.max_pixels=1200"):
        predictor.predict(file)


def test_training_and_evaluation_know_the_limit(lm_dir: Path, oracle_dir: Path) -> None:
    from uvim_fsq.evaluation.run import evaluate

    with pytest.raises(UserError, match="32 x 24.*data.max_pixels=768"):
        evaluate(oracle_dir, ["data.max_pixels=767"])
    evaluate(oracle_dir, ["data.max_pixels=768"], limit=1)


def test_no_memory_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "L", "P", "I;16", "I", "CMYK", "1"])
def test_pictures_are_as_before_in_strips(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    if mode.startswith("I"):
        image = Image.fromarray(
            rng.integers(0, 70_000 if mode == "I" else 65_536, (37, 23)).astype(np.int32 if mode == "I" else np.uint16)
        )
    else:
        image = Image.fromarray(rng.integers(0, 256, (37, 23, 4), np.uint8)).convert("RGBA").convert(mode)
    if mode == "P":
        image.info["transparency"] = 7
    whole = to_rgb(image)
    monkeypatch.setattr(images, "STRIP", 23 * 4)
    assert np.array_equal(to_rgb(image), whole) and whole.shape == (37, 23, 3)
    if mode.startswith("I"):
        expected = np.clip(np.asarray(image, np.float64) * (255.0 / 65535.0), 0, 255).round().astype(np.uint8)
        assert np.array_equal(whole, np.stack([expected] * 3, -1))
    elif mode in ("RGBA", "LA", "P"):
        rgba = image.convert("RGBA")
        over = Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba)
        assert np.array_equal(whole, np.asarray(over.convert("RGB")))
    else:
        assert np.array_equal(whole, np.asarray(image.convert("RGB")))


def test_turned_pictures_stand_upright() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 23, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.info["exif"] = exif.tobytes()
    upright = to_rgb(image)
    assert upright.shape == (23, 37, 3) and np.array_equal(upright, np.rot90(np.asarray(image), -1))


def test_other_kinds_of_files_are_no_pictures(tmp_path: Path) -> None:
    """EPS would start Ghostscript; an id map that is no PNG is none."""
    (tmp_path / "a.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    with pytest.raises(UserError, match="cannot be read as an image .it is none of JPEG, PNG"):
        read_image(tmp_path / "a.jpg")
    Image.new("RGB", (9, 9)).save(tmp_path / "b.bmp")
    with pytest.raises(UserError, match="cannot be read as a PNG"):
        decode_ids((tmp_path / "b.bmp").read_bytes(), "b")
    for data in (b"", images._PNG, png(3, 2)[:30]):
        assert decode_png(data, "x") is None
    assert decode_png(png(3, 2), "x").shape == (2, 3, 3)  # type: ignore[union-attr]


def test_deep_greys_take_little_more_than_their_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.fromarray(np.full((1000, 1000), 60_000, np.uint16))
    monkeypatch.setattr(images, "STRIP", 100_000)
    tracemalloc.start()
    to_rgb(image)
    used = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert used < 10e6, "bytes for a million pixels, 3 of them the result's"


# ---------------------------------------------------------------- arrays


def claim(shape: tuple[int, ...], dtype: str = "<f4") -> bytes:
    """The header of a .npy that holds nothing."""
    text = repr({"descr": dtype, "fortran_order": False, "shape": shape}).ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


def test_npy_files_are_measured_first(tmp_path: Path) -> None:
    file = tmp_path / "a.npy"
    for shape in ((60_000, 60_000), (1 << 31, 1 << 31), (1 << 62, 8)):
        file.write_bytes(claim(shape) + b"\0" * 64)
        assert peak(lambda: read_depth_file(file)) < 1
        with pytest.raises(UserError, match="declares an array float32"):
            read_depth_file(file)
    file.write_bytes(claim((2, 8)) + b"\0" * 63)
    with pytest.raises(UserError, match="of 64 bytes but holds 63"):
        read_depth_file(file)
    file.write_bytes(claim((2, 8)) + struct.pack("<16f", *[2.0] * 16))
    assert read_depth_file(file).shape == (2, 8)
    np.save(file, np.array([{}], object))
    with pytest.raises(UserError, match="holds Python objects, not real numbers"):
        read_depth_file(file)
    file.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", 60_000) + b"(" * 60_000)
    with pytest.raises(UserError, match="cannot be read as a depth map"):
        read_depth_file(file)
    limit_pixels(15)
    file.write_bytes(claim((2, 8)) + struct.pack("<16f", *[2.0] * 16))
    with pytest.raises(UserError, match="8 x 2"):
        read_depth_file(file)


def test_npz_files_are_measured_first(tmp_path: Path) -> None:
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


def test_hdf5_datasets_are_measured_first(tmp_path: Path) -> None:
    file = tmp_path / "a.h5"

    def write(rgb: tuple[int, ...], depth: tuple[int, ...], dtype: object = np.float32) -> None:
        with h5py.File(file, "w") as handle:
            # Chunks that were never written take no room in the file.
            handle.create_dataset("rgb", rgb, np.uint8, chunks=True)
            handle.create_dataset("depth", depth, dtype, chunks=True)

    source = PairSource(tmp_path, [("a", file, file)], {})
    write((3, 50_000, 50_000), (50_000, 50_000))
    assert file.stat().st_size < 100_000
    assert peak(lambda: source[0]) < 5 and peak(lambda: read_depth_file(file)) < 5
    with pytest.raises(UserError, match="50000 x 50000, 2500 million pixels"):
        source[0]
    for rgb, depth, dtype in (
        ((1 << 30, 20, 20), (20, 20), np.float32),
        ((3, 20, 20), (1 << 30, 20, 20), np.float32),
        ((3, 20, 20), (20, 20), h5py.string_dtype()),
    ):
        write(rgb, depth, dtype)
        assert peak(lambda: source[0]) < 5
    write((3, 20, 20), (20, 20))
    (tmp_path / "other.h5").write_bytes(file.read_bytes())
    with h5py.File(file, "a") as handle:
        del handle["depth"]
        handle["depth"] = h5py.ExternalLink("other.h5", "/depth")
    with pytest.raises(UserError, match="is stored in another file"):
        source[0]
    with h5py.File(file, "a") as handle:
        del handle["depth"]
        handle.create_dataset("depth", (2, 2), "<f4", external=[(str(tmp_path / "other.h5"), 0, 16)])
    with pytest.raises(UserError, match="is stored in another file"):
        read_depth_file(file)


def test_a_huge_labelled_mat_is_measured_first(tmp_path: Path) -> None:
    import scipy.io

    file = tmp_path / "nyu_depth_v2_labeled.mat"
    scipy.io.savemat(tmp_path / "splits.mat", {"trainNdxs": [[1]], "testNdxs": [[2]]})
    with h5py.File(file, "w") as handle:
        handle.create_dataset("images", (2, 3, 50_000, 50_000), np.uint8, chunks=True)
        handle.create_dataset("rawDepths", (2, 50_000, 50_000), np.float32, chunks=True)
    with pytest.raises(UserError, match="2500 million pixels"):
        LabelledMat(file, "val", "raw")


def test_a_zipped_png_is_measured_first(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("p/a.png", b"\0" * 50_000_000)
        archive.writestr("p/b.png", png(2, 2))
    store = PngStore(tmp_path / "a.zip", "p/")
    assert peak(lambda: store.read("a.png")) < 5
    assert store.read("b.png") == png(2, 2)


def test_depth_is_coloured_by_a_table() -> None:
    import matplotlib

    values = np.random.default_rng(0).random((50, 70)).astype(np.float32) * 12
    values[0, :3] = (10.0, np.nan, -1)
    share = np.clip(np.nan_to_num(values) / 10.0, 0, 1)
    expected = (matplotlib.colormaps["viridis"](share)[..., :3] * 255).astype(np.uint8)
    assert np.array_equal(colour(values, 10.0), expected)
    big = np.ones((2000, 2000), np.float32)
    tracemalloc.start()
    colour(big, 10.0)
    used = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert used / big.size < 25, "bytes per pixel"
