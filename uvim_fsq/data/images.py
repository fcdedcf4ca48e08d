"""Reads image files as upright 8-bit RGB, by their header, up to `data.max_pixels` pixels, and writes PNGs."""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from uvim_fsq.compilation import compiler_unloaded
from uvim_fsq.config.schema import DataConfig
from uvim_fsq.data.decoded import decoded
from uvim_fsq.data.sample import Array
from uvim_fsq.errors import UserError
from uvim_fsq.files import write_whole

#: The formats that Pillow may open. Others are unsafe: EPS, for example, starts Ghostscript on the file's content.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "TIFF", "GIF", "PPM")
#: EXIF orientation -> how the picture is turned upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
#: Pixels to convert at a time, so that a large image needs little more memory than its pixels.
STRIP = 1 << 22
_PNG = b"\x89PNG\r\n\x1a\n"
_max_pixels = DataConfig.max_pixels


def limit_pixels(count: int) -> None:
    """Sets the largest image that this process decodes, in pixels (`data.max_pixels`)."""
    global _max_pixels
    if (count, count) == (_max_pixels, Image.MAX_IMAGE_PIXELS):
        return
    # Pillow's own limit protects plugins that open files. It warns above the limit and refuses twice as much; the
    # warning is silenced, because `check_pixels` reports it better.
    _max_pixels = Image.MAX_IMAGE_PIXELS = count
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def check_pixels(width: int, height: int, name: str | Path) -> None:
    """Raises UserError for an image or label map with more than `data.max_pixels` pixels."""
    if width * height > _max_pixels:
        raise UserError(
            f"{name} has {width} x {height}, {width * height / 1e6:.0f} million pixels, but data.max_pixels allows "
            f"{_max_pixels / 1e6:g} million; make it smaller, or set data.max_pixels={width * height}"
        )


def _name(source: str | Path | bytes) -> str | Path:
    return "the image" if isinstance(source, bytes) else source


@contextmanager
def open_picture(source: str | Path | bytes) -> Iterator[Image.Image]:
    """Opens an image file, or its content, and checks its size by the header; the pixels are not decoded yet.

    Raises Pillow's errors, and UserError if the image is too large or if the block runs out of memory.
    """
    path, size = _name(source), "its"
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image:
            check_pixels(image.width, image.height, path)
            size = f"{image.width} x {image.height}"
            yield image
    except Image.DecompressionBombError as error:
        raise UserError(
            f"{path} has more than twice the {_max_pixels / 1e6:g} million pixels that data.max_pixels allows; "
            "make it smaller, or set data.max_pixels"
        ) from error
    except MemoryError as error:
        raise UserError(f"{path}: not enough memory for {size} pixels; make it smaller") from error


def decode_png(data: bytes, name: str | Path) -> np.ndarray | None:
    """The unconverted pixels of a PNG: (H, W) or (H, W, C), channels in OpenCV's order (BGR); None if it is not a PNG.

    Raises UserError if it has too many pixels, before decoding it, or if memory runs out.
    """
    # Every PNG begins with its signature and a 13-byte header chunk.
    if data[:8] != _PNG or data[12:16] != b"IHDR" or len(data) < 33:
        return None
    width, height = struct.unpack(">II", data[16:24])
    check_pixels(width, height, name)
    try:
        return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except (MemoryError, cv2.error) as error:
        raise UserError(f"{name} cannot be decoded: not enough memory for {width} x {height} pixels") from error


def to_rgb(image: Image.Image) -> np.ndarray:
    """Any PIL image -> (H, W, 3) uint8: rotated upright by EXIF, alpha composited over white, 16 bits scaled down.

    Raises ValueError for floating-point pixels, and UserError for more than `data.max_pixels`.
    """
    check_pixels(image.width, image.height, getattr(image, "filename", "") or "the image")
    image.load()  # a TIFF turns itself
    # Not by ImageOps.exif_transpose, which also writes the other EXIF fields anew and fails on those of some cameras.
    turn = _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    if turn is not None:
        image = image.transpose(turn)
    if image.mode == "F":
        raise ValueError("floating-point pixels of unknown range; save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        image = Image.fromarray(_eight_bits(np.asarray(image)))
    transparent = "A" in image.getbands() or "transparency" in image.info
    rgb = np.empty((image.height, image.width, 3), np.uint8)
    for rows in _strips(rgb):
        strip = image.crop((0, rows.start, image.width, rows.stop))
        if transparent:
            strip = strip.convert("RGBA")
            strip = Image.alpha_composite(Image.new("RGBA", strip.size, (255, 255, 255, 255)), strip)
        rgb[rows] = np.asarray(strip.convert("RGB"))
    return rgb


def _strips(array: np.ndarray) -> Iterator[slice]:
    """Slices of rows that cover an image, each of about STRIP pixels."""
    height, rows = array.shape[0], max(1, STRIP // max(1, array.shape[1]))
    return (slice(top, min(top + rows, height)) for top in range(0, height, rows))


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """16-bit or 32-bit gray values -> uint8; PIL's convert() would clip them at 255."""
    scale = 255.0 / 65535.0 if values.max(initial=0) > 255 else 1.0
    table = np.clip(np.arange(1 << 16) * scale, 0, 255).round().astype(np.uint8)
    gray = np.empty(values.shape, np.uint8)
    for rows in _strips(gray):
        gray[rows] = table[np.clip(values[rows], 0, len(table) - 1)]
    return gray


def _plain_jpeg(image: Image.Image, source: str | Path | bytes) -> np.ndarray | None:
    """The pixels of an upright grayscale or RGB JPEG, (H, W, 3) uint8; None for anything else and for a damaged file.

    torchvision uses the same decoder as Pillow, with the same result, but avoids copying the image twice. OpenCV would
    be as fast, but pads truncated files instead of failing.
    """
    if image.format != "JPEG" or image.mode not in ("RGB", "L"):
        return None
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        return None
    with compiler_unloaded():
        from torchvision.io import ImageReadMode, decode_jpeg

    data = np.frombuffer(bytearray(source), np.uint8) if isinstance(source, bytes) else np.fromfile(source, np.uint8)
    try:
        pixels = decode_jpeg(torch.from_numpy(data), ImageReadMode.RGB)
    except RuntimeError:
        return None
    assert isinstance(pixels, torch.Tensor)
    return pixels.permute(1, 2, 0).contiguous().numpy()


def read_image(source: str | Path | bytes) -> np.ndarray:
    """An image file, or its content -> (H, W, 3) uint8 RGB. The format is taken from the header, not the extension.

    Raises UserError naming the file if it is missing, truncated, too large or not an image.
    """
    if isinstance(source, bytes):
        return _decode_image(source)
    return decoded(Path(source), np.uint8, "image", lambda: _decode_image(source))


def _decode_image(source: str | Path | bytes) -> np.ndarray:
    path = _name(source)
    try:
        with open_picture(source) as image:
            rgb = _plain_jpeg(image, source)
            return to_rgb(image) if rgb is None else rgb
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: no such image file") from None
    except UnidentifiedImageError:
        # Pillow's message would name an object in memory if the content was given.
        known = ", ".join(FORMATS)
        raise UserError(f"{path} cannot be read as an image (it is none of {known}); replace or remove it") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{path} cannot be read as an image ({error}); replace or remove it") from error


def write_png(path: str | Path, pixels: Array, info: PngInfo | None = None) -> None:
    """Writes (H, W, 3) or (H, W) uint8, or (H, W) uint16, as a PNG, atomically. Raises UserError if that fails."""
    picture = Image.fromarray(pixels)
    write_whole(Path(path), lambda file: picture.save(file, format="PNG", pnginfo=info), durable=False)
