"""Reads depth maps, and pairs of image and depth files, as a `SampleSource` with one map `depth`: (H, W) float32
meters, 0 where invalid.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import h5py
import numpy as np

from uvim_fsq.data.arrays import check_npy
from uvim_fsq.data.decoded import decoded
from uvim_fsq.data.images import check_pixels, open_picture, read_image
from uvim_fsq.data.sample import Sample
from uvim_fsq.data.saved_datasets import SavedRows, read_photo
from uvim_fsq.errors import UserError


def meters(values: np.ndarray, name: str) -> np.ndarray:
    """(H, W) meters -> float32 with invalid values (NaN, infinite, negative) set to 0.

    Raises UserError for another shape, and for a median outside of 0.02 to 100 m, which means a wrong scale.
    """
    if values.ndim != 2:
        raise UserError(f"{name}: the depth map has shape {values.shape}, expected (H, W)")
    depth = np.asarray(values, np.float32)
    valid = (depth > 0) & (depth < np.inf)
    if not valid.all():
        depth = np.where(valid, depth, np.float32(0))
    # If most depths are plausible, so is the median, which takes ten times as long to compute.
    if 2 * np.count_nonzero((depth > 0.1) & (depth < 90)) > np.count_nonzero(valid) or not valid.any():
        return depth
    median = float(np.median(depth[valid]))
    if not 0.02 <= median <= 100:
        raise UserError(
            f"{name}: median depth {median:.3g} m; the scale is wrong (meters expected; "
            "set task.depth_scale for your own data)"
        )
    return depth


def read_depth_picture(source: Path | bytes, scale: float | None = None) -> np.ndarray:
    """A picture of depth, or its content -> (H, W) float32 meters; `scale` as for `read_depth_file`.

    Raises Pillow's errors, ValueError for colors, palettes and single bits, and UserError if it is too large.
    """
    with open_picture(source) as image:
        image.load()
        if image.mode not in ("L", "F") and not image.mode.startswith("I"):
            raise ValueError(f"its pixels are of kind {image.mode}; depth is gray, of 8 or 16 bits or real numbers")
        usual = {"F": 1.0}.get(image.mode, 1000.0 if image.mode.startswith("I") else 25.5)
        return np.asarray(image, np.float32) / (scale or usual)


def read_depth_file(path: Path, scale: float | None = None, mask: Path | None = None) -> np.ndarray:
    """A depth map in any supported format -> (H, W) float32 meters, 0 where invalid.

    `scale`: stored units per meter. Default: 16-bit PNG is in millimeters, 8-bit PNG has 255 = 10 m (as in DenseDepth),
    TIFF of real numbers, .npy and .h5 (dataset `depth`) are in meters. Where the file `mask` is 0, so is the depth.

    Raises UserError naming the file.
    """
    try:
        if path.suffix == ".npy":
            values = _load_npy(path) / (scale or 1.0)
        elif path.suffix in (".h5", ".hdf5"):
            with h5py.File(path, "r") as file:
                values = np.asarray(h5_dataset(file, "depth", path, 2)) / (scale or 1.0)
        else:
            values = read_depth_picture(path, scale)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: no such depth file; the data set is incomplete") from None
    except MemoryError as error:
        raise UserError(f"{path} is too large for this machine's memory; make it smaller") from error
    except Exception as error:  # Pillow, NumPy and h5py raise many kinds for a damaged file
        raise UserError(f"{path} cannot be read as a depth map ({one_line(error)}); replace or remove it") from error
    if mask is not None:
        valid = read_mask(mask)
        if valid.shape != values.shape:
            raise UserError(f"{mask} is {valid.shape}, but its depth map {values.shape}; fix or remove it")
        values = np.where(valid, values, 0)
    return meters(values, str(path))


def _load_npy(path: Path) -> np.ndarray:
    """An array whose size is checked first; (H, W, 1), as in DIODE, becomes (H, W)."""
    with path.open("rb") as file:
        shape = check_npy(file, path.stat().st_size, path)
    if len(shape) in (2, 3):
        check_pixels(shape[1], shape[0], path)
    values = np.load(path, allow_pickle=False)
    return values[..., 0] if values.ndim == 3 and values.shape[2] == 1 else values


def read_mask(path: Path) -> np.ndarray:
    """A mask of valid pixels, .npy or a picture -> (H, W) bool: values above 0. Raises UserError naming the file."""
    try:
        if path.suffix == ".npy":
            values = _load_npy(path)
        else:
            with open_picture(path) as image:
                values = np.asarray(image)
    except UserError:
        raise
    except Exception as error:  # Pillow and NumPy raise many kinds for a damaged file
        raise UserError(f"{path} cannot be read as a mask ({one_line(error)}); replace or remove it") from error
    if values.ndim != 2:
        raise UserError(f"{path}: the mask has shape {values.shape}, expected (H, W)")
    return values > 0


def _fingerprint(file: Path) -> list[Any]:
    """A file's path, size and modification time; without the last two if it is missing."""
    try:
        stat = file.stat()
    except OSError:
        return [str(file)]
    return [str(file), stat.st_size, stat.st_mtime_ns]


def _same_size(image: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """An image that is larger than its depth map, as in ScanNet, shrunk to its `size` if it has the same shape."""
    height, width = image.shape[:2]
    if height > size[0] and width > size[1] and abs(width * size[0] / (height * size[1]) - 1) < 0.02:
        return cv2.resize(image, (size[1], size[0]), interpolation=cv2.INTER_AREA)
    return image


def one_line(error: BaseException) -> str:
    """An error message in one line, without the memory addresses and dates in those of HDF5."""
    text = " ".join(str(error).split()) or type(error).__name__
    return re.sub(r"time = .*error message = '([^']*)'.*", r"\1)", text)[:160]


def h5_dataset(file: h5py.File, key: str, path: Path, dims: int) -> h5py.Dataset:
    """The HDF5 dataset `key`, checked before it is read: `dims` dimensions, the last two being those of an image.

    Raises UserError if it is missing, not numeric, stored in another file, or has too many pixels.
    """
    # `get` would report a damaged dataset as missing.
    if key not in file or not isinstance(found := file[key], h5py.Dataset):
        raise UserError(f"{path} has no dataset {key!r} (it holds {', '.join(file) or 'nothing'})")
    if found.file.filename != file.filename or found.external or found.is_virtual:
        raise UserError(f"{path}: dataset {key!r} is stored in another file, which is not read; copy it into this one")
    if found.ndim != dims or found.dtype.kind not in "fiu":
        raise UserError(f"{path}: `{key}` is {found.dtype} {found.shape}, expected numbers in {dims} dimensions")
    # HDF5 decompresses whole chunks, which may be larger than the dataset.
    for height, width in (found.shape[-2:], (found.chunks or found.shape)[-2:]):
        check_pixels(width, height, f"{path}, dataset {key!r}")
    return found


@dataclass
class PairSource:
    """Layouts B, C and your own data: a list of (id, image file, depth file); in layout B both are one .h5 file."""

    root: Path
    pairs: list[tuple[str, Path, Path]]
    info: dict[str, Any]
    scale: float | None = None
    broken: str = "replace it"
    """Advice for a damaged .h5 file."""
    masks: dict[str, Path] = field(default_factory=dict[str, Path])
    """Your own data: id -> mask of the valid pixels."""
    shrink: bool = False
    """Your own data: an image that is larger than its depth map gets its size."""

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Sample:
        name, image_file, depth_file = self.pairs[index]
        if image_file == depth_file:
            image, depth = _read_fastdepth(image_file, self.broken)
        else:
            image, mask = read_image(image_file), self.masks.get(name)
            how = ["depth", self.scale] if mask is None else ["depth", self.scale, *_fingerprint(mask)]
            depth = decoded(depth_file, np.float32, how, lambda: read_depth_file(depth_file, self.scale, mask))
            if self.shrink:
                image = _same_size(image, depth.shape)
        if image.shape[:2] != depth.shape:
            raise UserError(
                f"{name}: image {image.shape[:2]} and depth {depth.shape} differ in size; fix or remove them"
            )
        return Sample(name, image, {"depth": depth})


@dataclass
class SavedSource:
    """Rows of a data set saved by the library `datasets`: an image and a depth map, a picture or an array."""

    rows: SavedRows
    info: dict[str, Any]
    scale: float | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        name, (photo, stored) = f"{self.rows.root}, {self.rows.name(index)}", self.rows[index].values()
        try:
            if isinstance(stored, bytes):
                depth = read_depth_picture(stored, self.scale)
            else:
                depth = np.asarray(stored, np.float32) / (self.scale or 1.0)
        except (OSError, SyntaxError, ValueError, TypeError) as error:
            raise UserError(f"{name}: no depth map ({one_line(error)}); remove it") from error
        image, depth = read_photo(photo, name), meters(depth, name)
        if image.shape[:2] != depth.shape:
            raise UserError(f"{name}: image {image.shape[:2]} and depth {depth.shape} differ in size; remove it")
        return Sample(self.rows.name(index), image, {"depth": depth})


def _read_fastdepth(path: Path, advice: str) -> tuple[np.ndarray, np.ndarray]:
    try:
        with h5py.File(path, "r") as file:
            stored = h5_dataset(file, "rgb", path, 3)
            if stored.shape[0] != 3 or stored.dtype != np.uint8:
                raise UserError(f"{path}: `rgb` is {stored.dtype} {stored.shape}, expected uint8 (3, H, W)")
            rgb, depth = np.asarray(stored), np.asarray(h5_dataset(file, "depth", path, 2))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; the data set is incomplete") from None
    except UserError:
        raise
    except MemoryError as error:
        raise UserError(f"{path} is too large for this machine's memory; make it smaller") from error
    except Exception as error:  # h5py raises many kinds for a damaged file
        raise UserError(
            f"{path} cannot be read ({one_line(error)}); it is damaged or not an HDF5 file, {advice}"
        ) from error
    return cv2.merge(list(rgb)), meters(depth, str(path))
