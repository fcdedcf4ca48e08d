"""Reads films frame by frame and writes them, by the FFmpeg library that OpenCV's package contains. Without sound."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np

from uvim_fsq.data.images import check_pixels
from uvim_fsq.data.sample import Array
from uvim_fsq.errors import UserError

#: File name extensions of films, in lower case.
FILM_SUFFIXES = {".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".ts"}
#: The format of films that are written.
SUFFIX = ".mp4"
#: Frames per second where a film does not tell, and the range that is believed and can be written.
USUAL_RATE, MIN_RATE, MAX_RATE = 25.0, 0.01, 1000.0
#: Codecs in order of preference. Browsers play VP9; H.264 is not in OpenCV's package.
CODECS = ("vp09", "mp4v")
#: Containers that FFmpeg may open, and from where: playlists would make it read other files, or addresses.
_ALLOWED = "format_whitelist;mov,mp4,matroska,webm,avi,mpeg,mpegts,mpegvideo,h264,hevc|protocol_whitelist;file"
_OPTIONS = "OPENCV_FFMPEG_CAPTURE_OPTIONS"


def _place(file: Path) -> str:
    """The path of a film as OpenCV takes it. Raises UserError for a name that is not UTF-8, which would crash it."""
    place = str(file.absolute())  # cannot be mistaken for an address or for a pattern of file names
    try:
        place.encode()
    except UnicodeEncodeError:
        raise UserError(f"{file}: the names of films and of their folders must be UTF-8; rename it") from None
    return place


class Film:
    """A film to be read once, frame by frame: an iterator of (H, W, 3) uint8 RGB, upright.

    Args:
        file: a film in a common container.

    Attributes:
        rate: frames per second.
        frames: how many, as its header says; 0 if it does not.
        read: how many have been read.

    Raises UserError for a file that is missing or not a film, and for frames of more than `data.max_pixels`.
    """

    def __init__(self, file: Path) -> None:
        self.file, self.read = file, 0
        if not os.path.exists(file):
            raise UserError(f"{file}: no such film")
        # Read once, when the library is loaded; its own lines would disturb the progress.
        os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
        level = cv2.setLogLevel(0)
        before = os.environ.get(_OPTIONS)
        os.environ[_OPTIONS] = _ALLOWED
        try:
            self._capture = cv2.VideoCapture(_place(file), cv2.CAP_FFMPEG)
        finally:
            cv2.setLogLevel(level)
            os.environ.pop(_OPTIONS, None)
            if before is not None:
                os.environ[_OPTIONS] = before
        if not self._capture.isOpened():
            raise UserError(f"{file} cannot be read as a film; convert it to MP4 or WebM, or replace it")
        width, height, rate, count = (
            self._capture.get(key)
            for key in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT, cv2.CAP_PROP_FPS, cv2.CAP_PROP_FRAME_COUNT)
        )
        check_pixels(int(width), int(height), file)
        self.rate = rate if MIN_RATE <= rate <= MAX_RATE else USUAL_RATE
        self.frames = int(count) if math.isfinite(count) and 0 < count < 1 << 40 else 0

    def __iter__(self) -> Iterator[Array]:
        try:
            while True:
                found, frame = self._capture.read()
                if not found:
                    break
                self.read += 1
                yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
        except cv2.error as error:
            raise UserError(f"{self.file}: frame {self.read + 1} cannot be read ({error.err}); convert it") from error
        finally:
            self._capture.release()
        if not self.read:
            raise UserError(f"{self.file}: no frame of this film can be read; convert it to MP4 or WebM, or replace it")


class FilmWriter:
    """Writes frames (H, W, 3) uint8 RGB of one size. An odd side gets one more pixel, which repeats the last.

    Args:
        file: the film, which is replaced; its suffix should be `SUFFIX`.
        rate: frames per second.
    """

    def __init__(self, file: Path, rate: float) -> None:
        self.file, self.rate = file, rate
        self.frames = 0
        self._writer: cv2.VideoWriter | None = None
        self._size = (0, 0)

    def write(self, frame: Array) -> None:
        """Adds a frame. Raises UserError for one of another size, or if no codec can write this size."""
        size = (frame.shape[1], frame.shape[0])
        if self._writer is None:
            self._writer, self._size = self._open(size[0] + size[0] % 2, size[1] + size[1] % 2), size
        if size != self._size:
            raise UserError(
                f"the frames of a film must have one size, but after {self._size[0]} x {self._size[1]} comes one of "
                f"{size[0]} x {size[1]}; predict these pictures with --write files"
            )
        even = np.pad(frame, ((0, size[1] % 2), (0, size[0] % 2), (0, 0)), mode="edge")
        self._writer.write(cv2.cvtColor(even, cv2.COLOR_RGB2BGR))
        self.frames += 1

    def _open(self, width: int, height: int) -> cv2.VideoWriter:
        for codec in CODECS:
            fourcc = cv2.VideoWriter.fourcc(*codec)
            writer = cv2.VideoWriter(_place(self.file), cv2.CAP_FFMPEG, fourcc, self.rate, (width, height))
            if writer.isOpened():
                return writer
        raise UserError(f"no film of {width} x {height} pixels can be written; use --write files")

    def close(self) -> None:
        """Completes the film."""
        if self._writer is not None:
            self._writer.release()


@contextmanager
def writing_film(file: Path, rate: float) -> Iterator[FilmWriter]:
    """A writer that is closed at the end of the block.

    Raises UserError if the film then has not as many frames as were written: OpenCV reports no full disk.
    """
    writer = FilmWriter(file, rate)
    try:
        yield writer
    finally:
        writer.close()
    try:
        complete = Film(file).frames == writer.frames
    except UserError:
        complete = False
    if not complete:
        raise UserError(f"{file} could not be written; free space, or choose another --out")
