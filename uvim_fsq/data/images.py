"""Reading pictures as people have them: by header, upright, as 8-bit RGB, and none larger than `data.max_pixels`."""

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
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from uvim_fsq.config.schema import DataConfig
from uvim_fsq.data.sample import Array
from uvim_fsq.errors import UserError
from uvim_fsq.files import write_whole

#: Only these: of Pillow's others one starts Ghostscript on what the picture says.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "TIFF", "GIF", "PPM")
#: Pixels that are converted at a time, so that a large picture needs little more memory than its own.
STRIP = 1 << 22
_PNG = b"\x89PNG\r\n\x1a\n"
_max_pixels = DataConfig.max_pixels


def limit_pixels(count: int) -> None:
    """Sets the size of the largest picture that this process decodes: `data.max_pixels` of the run it works for."""
    global _max_pixels
    if (count, count) == (_max_pixels, Image.MAX_IMAGE_PIXELS):
        return
    # Also for what a plugin opens. Pillow warns above this number and refuses twice as much; ours is one line.
    _max_pixels = Image.MAX_IMAGE_PIXELS = count
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def check_pixels(width: int, height: int, name: str | Path) -> None:
    """Raises UserError for a picture, or a map of labels, with more than `data.max_pixels` pixels."""
    if width * height > _max_pixels:
        raise UserError(
            f"{name} is {width} x {height}, {width * height / 1e6:.0f} million pixels, and data.max_pixels allows "
            f"{_max_pixels / 1e6:g} million; make it smaller, or set data.max_pixels={width * height}"
        )


def _name(source: str | Path | bytes) -> str | Path:
    return "the picture" if isinstance(source, bytes) else source


@contextmanager
def open_picture(source: str | Path | bytes) -> Iterator[Image.Image]:
    """A picture file or its content, its header read and its size found bearable. Raises as Pillow does, UserError for
    the size, and when memory runs out inside."""
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
    """The pixels of a PNG as they are, (H, W) or (H, W, C) in OpenCV's order of channels; None for what is no PNG.

    Raises UserError, before anything is decoded, for too many pixels, and when memory runs out.
    """
    # Every PNG begins with its signature and a header of 13 bytes.
    if data[:8] != _PNG or data[12:16] != b"IHDR" or len(data) < 33:
        return None
    width, height = struct.unpack(">II", data[16:24])
    check_pixels(width, height, name)
    try:
        return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except (MemoryError, cv2.error) as error:
        raise UserError(f"{name} cannot be decoded: not enough memory for {width} x {height} pixels") from error


def to_rgb(image: Image.Image) -> np.ndarray:
    """Any PIL image -> (H, W, 3) uint8: upright by EXIF, alpha over white, 16-bit scaled down."""
    check_pixels(image.width, image.height, getattr(image, "filename", "") or "the image")
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels, whose range nothing says; save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        image = Image.fromarray(_eight_bits(np.asarray(image)))
    see_through = "A" in image.getbands() or "transparency" in image.info
    rgb = np.empty((image.height, image.width, 3), np.uint8)
    for rows in _strips(rgb):
        strip = image.crop((0, rows.start, image.width, rows.stop))
        if see_through:
            strip = strip.convert("RGBA")
            strip = Image.alpha_composite(Image.new("RGBA", strip.size, (255, 255, 255, 255)), strip)
        rgb[rows] = np.asarray(strip.convert("RGB"))
    return rgb


def _strips(array: np.ndarray) -> Iterator[slice]:
    """The rows of a picture, so many at a time that they make up about STRIP pixels."""
    height, rows = array.shape[0], max(1, STRIP // max(1, array.shape[1]))
    return (slice(top, min(top + rows, height)) for top in range(0, height, rows))


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """Greys of 16 or 32 bits -> uint8; they would be clipped at 255 by convert()."""
    scale = 255.0 / 65535.0 if values.max(initial=0) > 255 else 1.0
    table = np.clip(np.arange(1 << 16) * scale, 0, 255).round().astype(np.uint8)
    grey = np.empty(values.shape, np.uint8)
    for rows in _strips(grey):
        grey[rows] = table[np.clip(values[rows], 0, len(table) - 1)]
    return grey


def _plain_jpeg(image: Image.Image, source: str | Path | bytes) -> np.ndarray | None:
    """The pixels of an upright grey or RGB JPEG; None for anything else and for a file that is broken.

    torchvision calls the same decoder as Pillow, to the same result, but does not copy the picture twice. OpenCV would
    be as fast, but fills up what a broken file lacks.
    """
    if image.format != "JPEG" or image.mode not in ("RGB", "L"):
        return None
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        return None
    from torchvision.io import ImageReadMode, decode_jpeg

    data = np.frombuffer(bytearray(source), np.uint8) if isinstance(source, bytes) else np.fromfile(source, np.uint8)
    try:
        pixels = decode_jpeg(torch.from_numpy(data), ImageReadMode.RGB)
    except RuntimeError:
        return None
    assert isinstance(pixels, torch.Tensor)
    return pixels.permute(1, 2, 0).contiguous().numpy()


def read_image(source: str | Path | bytes) -> np.ndarray:
    """A picture file, or its content -> (H, W, 3) uint8 RGB, decoded by its header, never by its extension.

    Raises UserError naming the file when it is missing, truncated or no picture.
    """
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
        # Pillow's own words name an object in memory where the content was given.
        known = ", ".join(FORMATS)
        raise UserError(f"{path} cannot be read as an image (it is none of {known}); replace or remove it") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{path} cannot be read as an image ({error}); replace or remove it") from error


def write_png(path: str | Path, pixels: Array, info: PngInfo | None = None) -> None:
    """Writes (H, W, 3) or (H, W) uint8, or (H, W) uint16, whole or not at all. Raises UserError where that fails."""
    picture = Image.fromarray(pixels)
    write_whole(Path(path), lambda file: picture.save(file, format="PNG", pnginfo=info), durable=False)
