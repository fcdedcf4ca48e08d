"""Films are read and written frame by frame, and nothing but the film is opened."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
import pytest

from tests.support.films import film, gray_frames
from uvim_fsq.errors import UserError
from uvim_fsq.inference.films import Film, FilmWriter, writing_film


@pytest.mark.parametrize("size", [(24, 32), (25, 33)])
def test_frames_come_back_in_order(tmp_path: Path, size: tuple[int, int]) -> None:
    frames = gray_frames(6, size)
    with writing_film(tmp_path / "a.mp4", 12) as writer:
        for frame in frames:
            writer.write(frame)
    read = Film(tmp_path / "a.mp4")
    assert read.rate == 12 and read.frames == 6
    found = list(read)
    assert len(found) == read.read == 6
    height, width = size
    assert found[0].shape == (height + height % 2, width + width % 2, 3)
    for given, back in zip(frames, found, strict=True):
        assert np.abs(back[:height, :width].astype(int) - given).mean() < 6


def test_colors_are_not_swapped(tmp_path: Path) -> None:
    red = np.zeros((32, 32, 3), np.uint8)
    red[..., 0] = 200
    with writing_film(tmp_path / "a.mp4", 25) as writer:
        writer.write(red)
    (found,) = Film(tmp_path / "a.mp4")
    assert found[..., 0].mean() > 150 and found[..., 2].mean() < 60


@pytest.mark.parametrize("kind", ["playlist", "list of films", "nothing", "noise"])
def test_only_films_are_opened_whatever_the_name_says(tmp_path: Path, kind: str) -> None:
    film(tmp_path / "secret.mp4", 3)
    text = {
        "playlist": f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{tmp_path}/secret.mp4\n#EXT-X-ENDLIST\n",
        "list of films": "ffconcat version 1.0\nfile secret.mp4\n",
        "nothing": "",
        "noise": "x" * 5000,
    }[kind]
    (tmp_path / "a.mp4").write_text(text)
    before = dict(os.environ)
    with pytest.raises(UserError, match=r"a\.mp4 cannot be read as a film; convert it to MP4 or WebM"):
        Film(tmp_path / "a.mp4")
    assert before.items() <= os.environ.items() and "OPENCV_FFMPEG_CAPTURE_OPTIONS" not in os.environ


def test_frames_with_too_many_pixels_are_refused(tmp_path: Path, default_pixel_limit: None) -> None:
    from uvim_fsq.data.images import limit_pixels

    film(tmp_path / "a.mp4", 1)
    limit_pixels(100)
    with pytest.raises(UserError, match=r"a\.mp4 has 32 x 24.*data\.max_pixels"):
        Film(tmp_path / "a.mp4")


def test_frames_of_two_sizes_are_refused(tmp_path: Path) -> None:
    writer = FilmWriter(tmp_path / "a.mp4", 25)
    writer.write(np.zeros((24, 32, 3), np.uint8))
    with pytest.raises(UserError, match="must have one size, but after 32 x 24 comes one of 30 x 24"):
        writer.write(np.zeros((24, 30, 3), np.uint8))
    writer.close()


def test_a_film_that_was_not_written_whole_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="could not be written; free space"), writing_film(tmp_path / "a.mp4", 25) as w:
        w.write(np.zeros((24, 32, 3), np.uint8))
        w.frames += 1  # a frame that did not reach the disk


def test_films_with_rotation_metadata_are_read_upright(tmp_path: Path) -> None:
    upper = np.zeros((24, 48, 3), np.uint8)
    upper[:8] = 200
    with writing_film(tmp_path / "a.mp4", 25) as writer:
        writer.write(upper)
    content = bytearray((tmp_path / "a.mp4").read_bytes())
    # The matrix of the track's header (ISO 14496-12, 8.3.2): 90 degrees clockwise.
    matrix = content.find(b"tkhd") + 44
    content[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    (tmp_path / "a.mp4").write_bytes(content)
    (frame,) = Film(tmp_path / "a.mp4")
    assert frame.shape == (48, 24, 3) and frame[:, -6:].mean() > 150 and frame[:, :6].mean() < 50


def test_names_that_are_not_utf_8_are_refused(tmp_path: Path) -> None:
    file = Path(os.fsdecode(os.fsencode(film(tmp_path / "a.mp4", 1)).replace(b"a.mp4", b"a\xff.mp4")))
    (tmp_path / "a.mp4").rename(file)
    with pytest.raises(UserError, match="must be UTF-8; rename it"):
        Film(file)
    with pytest.raises(UserError, match="must be UTF-8"):
        FilmWriter(file, 25).write(np.zeros((24, 32, 3), np.uint8))


@pytest.mark.parametrize("rate", [0.01, 29.97, 1000])
def test_all_rates_that_are_allowed_can_be_written(tmp_path: Path, rate: float) -> None:
    assert Film(film(tmp_path / "a.mp4", 2, rate=rate)).rate == pytest.approx(rate, rel=1e-3)
