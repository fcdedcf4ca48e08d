"""JPEGs decode as Pillow decodes them; broken ones are refused."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from uvim_fsq.data.images import read_image, to_rgb
from uvim_fsq.errors import UserError

RNG = np.random.default_rng(0)


def jpeg(mode: str, **options: object) -> bytes:
    gray = RNG.integers(0, 256, (9, 12, 3), dtype=np.uint8)
    smooth = Image.fromarray(gray).resize((75, 53), Image.Resampling.BICUBIC).convert(mode)
    file = io.BytesIO()
    smooth.save(file, "JPEG", **options)
    return file.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
def test_jpegs_decode_as_in_pillow(tmp_path: Path, mode: str, progressive: bool, subsampling: int) -> None:
    file = tmp_path / "a.png"  # the suffix does not decide the format
    file.write_bytes(jpeg(mode, quality=80, progressive=progressive, subsampling=subsampling) + b"rest of another file")
    with Image.open(file) as image:
        expected = to_rgb(image)
    pixels = read_image(file)
    np.testing.assert_array_equal(pixels, expected)
    assert pixels.shape == (53, 75, 3) and pixels.dtype == np.uint8 and pixels.flags.c_contiguous


def test_the_exif_rotation_of_a_jpeg_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "rotated.jpg").write_bytes(jpeg("RGB", exif=exif))
    assert read_image(tmp_path / "rotated.jpg").shape == (75, 53, 3)


def test_broken_jpegs_are_refused(tmp_path: Path) -> None:
    whole = jpeg("RGB", quality=95)
    for size in (1, 30, 200, len(whole) // 2, len(whole) - 9):
        file = tmp_path / "short.jpg"
        file.write_bytes(whole[:size])
        with pytest.raises(UserError, match="short.jpg cannot be read as an image"):
            read_image(file)
    # A second start of frame, of a kind that the decoder does not support; some readers ignore it.
    start = whole.index(b"\xff\xda")
    (tmp_path / "twice.jpg").write_bytes(whole[:start] + b"\xff\xf3\x00\x04ab" + whole[start:])
    with pytest.raises(UserError, match="twice.jpg cannot be read as an image"):
        read_image(tmp_path / "twice.jpg")
