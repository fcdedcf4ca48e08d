"""`Predictor.predict_film`: the frames of a film with their predictions, in order and in constant memory."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.support.films import film
from uvim_fsq import Predictor
from uvim_fsq.data.tiles import Tiling
from uvim_fsq.errors import UserError
from uvim_fsq.inference.films import Film
from uvim_fsq.tasks.base import Task
from uvim_fsq.tasks.nyu_depth.task import NYUDepth


@pytest.fixture
def predictor(random_runs: tuple[Path, Path]) -> Predictor:
    return Predictor.from_run(random_runs[1], ["eval.batch_size=2"])


def test_every_frame_comes_in_order_with_its_prediction(tmp_path: Path, predictor: Predictor) -> None:
    clip = film(tmp_path / "clip.mp4", 5)
    found = list(predictor.predict_film(str(clip)))
    frames = list(Film(clip))
    assert len(found) == len(frames) == 5
    for (frame, depth), expected in zip(found, frames, strict=True):
        np.testing.assert_array_equal(frame, expected)
        np.testing.assert_array_equal(depth, predictor.predict(expected))
        assert depth.shape == (24, 32) and depth.dtype == np.float32


def test_a_film_is_read_a_batch_at_a_time(
    tmp_path: Path, predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    plain = Film.__iter__

    def watched(self: Film) -> Iterator[np.ndarray]:
        for frame in plain(self):
            read.append(self.read)
            yield frame

    monkeypatch.setattr(Film, "__iter__", watched)
    predictions = predictor.predict_film(film(tmp_path / "clip.mp4", 7))
    assert read == []
    assert len(list(itertools.islice(predictions, 3))) == 3
    assert read == [1, 2, 3, 4]


def test_frames_can_be_predicted_by_tiles(tmp_path: Path, predictor: Predictor) -> None:
    (frame, depth), _ = predictor.predict_film(film(tmp_path / "clip.mp4", 2), Tiling(16))
    np.testing.assert_array_equal(depth, predictor.predict_tiles(frame, Tiling(16)))
    assert not np.array_equal(depth, predictor.predict(frame))


def test_what_is_no_film_is_refused_at_the_call(
    tmp_path: Path, predictor: Predictor, default_pixel_limit: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="nowhere.mp4: no such film"):
        predictor.predict_film(tmp_path / "nowhere.mp4")
    (tmp_path / "a.mp4").write_text("text")
    with pytest.raises(UserError, match="a.mp4 cannot be read as a film"):
        predictor.predict_film(tmp_path / "a.mp4")
    clip = film(tmp_path / "b.mp4", 1)
    with pytest.raises(UserError, match="b.mp4 has 32 x 24.*data.max_pixels"):
        predictor.with_overrides(["data.max_pixels=100"]).predict_film(clip)
    monkeypatch.setattr(NYUDepth, "tiled", Task.tiled)
    with pytest.raises(UserError, match="tiles"):
        predictor.predict_film(clip, Tiling(16))
