"""Images of every mode are read as 8-bit RGB."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.decompression import png
from uvim_fsq.data import images
from uvim_fsq.data.images import decode_png, read_image, to_rgb
from uvim_fsq.errors import UserError
from uvim_fsq.tasks.coco_panoptic.data import decode_ids

pytestmark = pytest.mark.usefixtures("default_pixel_limit")


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "L", "P", "I;16", "I", "CMYK", "1"])
def test_conversion_in_strips_equals_pillows(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_exif_rotation_is_applied() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 23, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.info["exif"] = exif.tobytes()
    upright = to_rgb(image)
    assert upright.shape == (23, 37, 3) and np.array_equal(upright, np.rot90(np.asarray(image), -1))


def test_unsupported_formats_are_refused(tmp_path: Path) -> None:
    """EPS would start Ghostscript; id maps must be PNGs."""
    (tmp_path / "a.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    with pytest.raises(UserError, match="cannot be read as an image .it is none of JPEG, PNG"):
        read_image(tmp_path / "a.jpg")
    Image.new("RGB", (9, 9)).save(tmp_path / "b.bmp")
    with pytest.raises(UserError, match="cannot be read as a PNG"):
        decode_ids((tmp_path / "b.bmp").read_bytes(), "b")
    for data in (b"", images._PNG, png(3, 2)[:30]):
        assert decode_png(data, "x") is None
    assert decode_png(png(3, 2), "x").shape == (2, 3, 3)


def test_16_bit_images_are_converted_in_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.fromarray(np.full((1000, 1000), 60_000, np.uint16))
    monkeypatch.setattr(images, "STRIP", 100_000)
    tracemalloc.start()
    to_rgb(image)
    used = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert used < 10e6, "bytes for a million pixels, 3 of them the result's"


def test_a_rotated_photo_is_read_whatever_its_other_exif_fields_hold(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x011A] = (72, 1)
    Image.new("RGB", (30, 20)).save(tmp_path / "a.jpg", exif=exif)
    data = (tmp_path / "a.jpg").read_bytes()
    # The field 0x011a (a fraction) becomes text of type 2, which Pillow cannot write as its kind demands.
    assert data.count(b"\x01\x1a\x00\x05") == 1
    (tmp_path / "a.jpg").write_bytes(data.replace(b"\x01\x1a\x00\x05", b"\x01\x1a\x00\x02"))
    assert read_image(tmp_path / "a.jpg").shape == (30, 20, 3)
