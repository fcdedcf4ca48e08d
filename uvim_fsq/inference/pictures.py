"""What a Predictor accepts as a picture, and its conversion to pixels.

H, W height and width of an image; B batch.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image

from uvim_fsq.data.images import read_image, to_rgb
from uvim_fsq.data.sample import Array
from uvim_fsq.errors import UserError

#: A path, the content of a file, an open file, a PIL image, an (H, W, 3) RGB or (H, W) grayscale uint8 array, or a
#: (3, H, W) RGB tensor, uint8 or floating point in [0, 1].
Picture = str | Path | bytes | BinaryIO | Image.Image | np.ndarray | torch.Tensor
PICTURES = (
    "a file, its content as bytes, a binary file object, a PIL image, an (H, W, 3) or (H, W) uint8 array, or a "
    "(3, H, W) tensor"
)


def content_of(image: Any) -> Any:
    """The content of an open file, because it can be read only once. Any other input is returned unchanged."""
    if isinstance(image, Image.Image) or not hasattr(image, "read"):
        return image
    if isinstance(image, io.TextIOBase):
        raise UserError("the picture's file is open in text mode; open it in binary mode")
    try:
        content = image.read()
    except (OSError, ValueError) as error:
        raise UserError(f"the picture cannot be read from the open file ({error})") from error
    if not isinstance(content, bytes):
        raise UserError(f"the picture's file returns {type(content).__name__}; open it in binary mode")
    return content


def pixels_of(image: Any) -> Array:
    """Converts any input except an open file to (H, W, 3) uint8. Raises UserError if it is not an image."""
    if isinstance(image, (str, Path, bytes)):
        return read_image(image)
    if isinstance(image, (bytearray, memoryview)):
        return read_image(bytes(image))
    if isinstance(image, Image.Image):
        try:
            image = to_rgb(image)
        except (OSError, SyntaxError, ValueError, AssertionError, AttributeError) as error:
            # Pillow asserts that the file is open.
            raise UserError(f"the picture cannot be used ({str(error) or 'its file is closed'})") from error
    if isinstance(image, torch.Tensor):
        try:
            image = _tensor_pixels(image)
        except (RuntimeError, TypeError) as error:  # sparse, quantized, without data, of a type that is only stored
            kind = f"{image.dtype}, {image.layout}, {image.device}"
            raise UserError(f"a tensor of {kind} cannot be used; give a dense one of uint8 or float32") from error
    if not isinstance(image, np.ndarray):
        raise UserError(f"expected {PICTURES}, got {type(image).__name__}")
    if image.ndim == 2 and image.dtype == np.uint8:
        image = np.repeat(image[..., None], 3, axis=-1)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        scale = "; scale it to 0..255 and make it uint8" if image.dtype.kind == "f" else ""
        raise UserError(f"expected an (H, W, 3) RGB or (H, W) gray uint8 array, got {image.dtype} {image.shape}{scale}")
    if not image.size:
        raise UserError(f"the picture has no pixels: {image.shape}")
    return image


def _tensor_pixels(image: torch.Tensor) -> Array:
    """A (3, H, W) tensor -> (H, W, 3) uint8. Raises UserError for another shape, type or range of values."""
    image = image.detach()
    said = f"{str(image.dtype).removeprefix('torch.')} {tuple(image.shape)}"
    if image.ndim != 3 or image.shape[0] != 3:
        more = "; use predict_batch for several" if image.ndim == 4 else ""
        raise UserError(f"expected a (3, H, W) RGB tensor, got {said}{more}")
    if image.is_floating_point():
        low, high = (float(x) for x in image.aminmax()) if image.numel() else (0.0, 0.0)
        if not (low >= 0 and high <= 1):  # also if one is not a number
            raise UserError(
                f"expected a floating-point tensor with values in [0, 1], got {low:.3g} to {high:.3g}; undo its "
                "normalization, or give uint8"
            )
        image = (image.float() * 255).round().to(torch.uint8)
    elif image.dtype != torch.uint8:
        raise UserError(f"expected a tensor of uint8 or floating point in [0, 1], got {said}")
    return np.ascontiguousarray(image.permute(1, 2, 0).cpu().numpy())
