"""Finds the pairs of image and depth map of KITTI: raw drives with the annotated depth maps of Uhrig et al. (arXiv
1708.06500), and the lists of the Eigen split (arXiv 1406.2283) in the forms in which they circulate.

Images: DATE/DRIVE/image_02/data/NAME.png or .jpg. Depth: [train/|val/]DRIVE/proj_depth/groundtruth/image_02/NAME.png,
16 bits, 256 = 1 m, 0 = no value; the first and last five frames of a drive have none.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from uvim_fsq.data.names import inner_name
from uvim_fsq.errors import UserError

#: Stored units per meter.
SCALE = 256.0
#: Folders of the two parts, relative to the data's root, in the order in which they are tried.
IMAGE_FOLDERS = ("", "raw", "raw_data", "kitti_raw", "rgb")
DEPTH_FOLDERS = ("data_depth_annotated", "gts", "groundtruth", "")
_DATE = re.compile(r"\d{4}_\d{2}_\d{2}")
_CAMERAS = {"l": "image_02", "r": "image_03"}

#: (id, image, depth map)
Pair = tuple[str, Path, Path]


def is_kitti(place: Path) -> bool:
    """Whether `place` holds KITTI's drives or annotated depth maps."""
    if not place.is_dir():
        return False
    return (place / "data_depth_annotated").is_dir() or bool(_dates(place))


def _dates(place: Path) -> list[Path]:
    folders = [place / name for name in IMAGE_FOLDERS if (place / name).is_dir()]
    dates = [path for folder in folders for path in folder.iterdir() if _DATE.fullmatch(path.name)]
    # Scenes of your own may be named by dates too.
    return [path for path in dates if next(path.glob("*_drive_*"), None) is not None]


@dataclass(frozen=True)
class Drives:
    """The folders of images and depth maps below a root."""

    root: Path
    listings: dict[Path, dict[str, str]] = field(default_factory=dict[Path, dict[str, str]])

    def _names(self, folder: Path) -> dict[str, str]:
        """Name without extension -> name of the pictures in a folder, which is listed once; empty if there is none.

        Of several formats, PNG is preferred to JPEG.
        """
        if folder not in self.listings:
            names = sorted(os.listdir(folder)) if folder.is_dir() else []
            parts = [os.path.splitext(name) for name in names]
            self.listings[folder] = {
                stem: stem + end for stem, end in parts if end.lower() in (".jpg", ".jpeg", ".png")
            }
        return self.listings[folder]

    def image(self, folder: str, stem: str) -> Path:
        """The image `folder`/`stem` with whatever extension; where it would be if there is none."""
        for top in IMAGE_FOLDERS:
            name = self._names(self.root / top / folder).get(stem)
            if name is not None:
                return self.root / top / folder / name
        return self.root / folder / f"{stem}.png"

    def depth(self, folder: str, stem: str) -> Path | None:
        """The depth map `folder`/`stem`.png; None if there is none."""
        for top in DEPTH_FOLDERS:
            for part in ("", "train", "val"):
                found = self.root / top / part / folder
                if stem in self._names(found):
                    return found / self._names(found)[stem]
        return None

    def listed(self, file: Path) -> tuple[list[Pair], int]:
        """Reads a list of the Eigen split: the pairs, and the number of lines without a depth map.

        A line is `image depth focal`, where the depth may be "None" (BTS and its successors), `image right_image`
        (monodepth), or `drive frame side` (monodepth2).

        Raises UserError for a missing file, a line of another form, and a path that leaves the data's folder.
        """
        try:
            lines = os.fsdecode(file.read_bytes()).splitlines()
        except OSError as error:
            raise UserError(f"{file} cannot be read ({error.strerror}); set task.list_file") from error
        pairs: list[Pair] = []
        missing = 0
        for line in filter(str.strip, lines):
            image, depth = _places(line, file)
            map_file = None if depth is None else self.depth(*depth)
            if map_file is None:
                missing += 1
            else:
                pairs.append(("/".join(image), self.image(*image), map_file))
        return pairs, missing

    def annotated(self, part: str) -> list[Pair]:
        """All pairs of `part` ("train" or "val") of the annotated depth maps as they are distributed."""
        return sorted(self._annotated(part))

    def _annotated(self, part: str) -> Iterator[Pair]:
        for top in DEPTH_FOLDERS:
            folder = self.root / top / part
            for drive in sorted(folder.iterdir()) if folder.is_dir() else []:
                for camera in _CAMERAS.values():
                    maps = drive / "proj_depth" / "groundtruth" / camera
                    for stem, name in self._names(maps).items():
                        image = f"{drive.name[:10]}/{drive.name}/{camera}/data"
                        yield f"{image}/{stem}", self.image(image, stem), maps / name


def _places(line: str, file: Path) -> tuple[tuple[str, str], tuple[str, str] | None]:
    """(folder, name without extension) of the image and of the depth map of a line; None if it says "None"."""
    parts = line.split()
    if len(parts) == 3 and parts[2] in _CAMERAS and parts[1].isdecimal() and len(parts[1]) <= 10:
        folder = inner_name(parts[0].strip("/"), file)
        image = f"{folder}/{_CAMERAS[parts[2]]}/data", f"{int(parts[1]):010d}"
        return image, _depth_of(image, line, file)
    if len(parts) < 2:
        raise UserError(f"{file}: line {line[:100]!r} is not `image depth focal` or `drive frame side`")
    image = _split(parts[0], file)
    if parts[1] == "None":
        return image, None
    if "proj_depth" in parts[1]:
        return image, _split(parts[1], file)
    return image, _depth_of(image, line, file)


def _split(path: str, file: Path) -> tuple[str, str]:
    folder, _, name = inner_name(path.lstrip("/"), file).rpartition("/")
    return folder, os.path.splitext(name)[0]


def _depth_of(image: tuple[str, str], line: str, file: Path) -> tuple[str, str]:
    """Where the depth map of DATE/DRIVE/CAMERA/data/NAME is."""
    parts = image[0].split("/")
    if len(parts) != 4:
        raise UserError(f"{file}: line {line[:100]!r} does not name an image as DATE/DRIVE/image_02/data/NAME")
    return f"{parts[1]}/proj_depth/groundtruth/{parts[2]}", image[1]
