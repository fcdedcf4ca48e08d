"""Reading pictures as people have them: by header, upright, as 8-bit RGB."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from uvim_fsq.data.sample import Array
from uvim_fsq.errors import UserError
from uvim_fsq.files import write_whole

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"}


def to_rgb(image: Image.Image) -> np.ndarray:
    """Any PIL image -> (H, W, 3) uint8: upright by EXIF, alpha over white, 16-bit scaled down."""
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels, whose range nothing says; save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        values = np.asarray(image, np.float64)
        # 16-bit greys would be clipped at 255 by convert().
        scale = 255.0 / 65535.0 if values.max(initial=0.0) > 255 else 1.0
        image = Image.fromarray(np.clip(values * scale, 0, 255).round().astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return np.asarray(image.convert("RGB"))


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
    path = "the picture" if isinstance(source, bytes) else source
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            rgb = _plain_jpeg(image, source)
            return to_rgb(image) if rgb is None else rgb
    except FileNotFoundError:
        raise UserError(f"{path}: no such image file") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read as an image ({error}); replace or remove it") from error


def write_png(path: str | Path, pixels: Array, info: PngInfo | None = None) -> None:
    """Writes (H, W, 3) or (H, W) uint8, or (H, W) uint16, whole or not at all. Raises UserError where that fails."""
    picture = Image.fromarray(pixels)
    write_whole(Path(path), lambda file: picture.save(file, format="PNG", pnginfo=info), durable=False)


def list_images(inputs: list[str]) -> list[Path]:
    """Files as given, folders searched recursively. Raises UserError for a missing path or a folder without images."""
    files: list[Path] = []
    for entry in map(Path, inputs):
        if entry.is_dir():
            found = sorted(p for p in entry.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
            if not found:
                raise UserError(f"{entry}: no images in this folder")
            files += found
        elif entry.is_file():
            files.append(entry)
        else:
            raise UserError(f"{entry}: no such file or folder")
    return files
