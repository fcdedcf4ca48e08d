"""`predict_files` on films, large pictures and lists, and after an interruption."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.cli import failure
from tests.support.films import film, gray_frames
from tests.support.photos import noise_photo as photo
from uvim_fsq.cli import main
from uvim_fsq.console import Bar
from uvim_fsq.errors import UserError
from uvim_fsq.inference.films import Film
from uvim_fsq.inference.predict_files import Options, predict_files
from uvim_fsq.inference.prediction_folder import JOURNAL, PredictionFolder
from uvim_fsq.inference.predictor import Predictor
from uvim_fsq.tasks.nyu_depth.task import NYUDepth


@pytest.fixture
def run(random_runs: tuple[Path, Path]) -> Path:
    return random_runs[1]


@pytest.fixture
def predicted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of pictures in each batch that the models have got."""
    counts: list[int] = []
    plain = Predictor._predict_with

    def watched(self: Predictor, decode: Any, images: Any, *seeds: Any) -> Any:
        counts.append(len(images))
        return plain(self, decode, images, *seeds)

    monkeypatch.setattr(Predictor, "_predict_with", watched)
    return counts


def index(out: Path) -> list[dict[str, str]]:
    return json.loads((out / "predictions.json").read_text())


@pytest.mark.slow
def test_complete_results_are_not_predicted_again(tmp_path: Path, run: Path, predicted: list[int]) -> None:
    files = [str(photo(tmp_path / "in" / f"{i}.png", i)) for i in range(3)]
    out = tmp_path / "out"
    first = predict_files(run, files[1:2], out)
    everything = predict_files(run, files, out)
    assert [entry["image"] for entry in everything] == files and everything[1] == first[0]
    assert predict_files(run, files, out) == everything == index(out)
    assert sum(predicted) == 3
    predict_files(run, files, out, options=Options(overwrite=True))
    assert sum(predicted) == 6


@pytest.mark.slow
@pytest.mark.parametrize("change", ["a setting", "the picture", "a missing file", "tiles", "the weights"])
def test_what_would_not_be_the_same_is_predicted_again(
    tmp_path: Path, run: Path, predicted: list[int], change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, out = photo(tmp_path / "a.png"), tmp_path / "out"
    predict_files(run, [str(file)], out)
    overrides, options = [], None
    if change == "a setting":
        overrides = ["eval.code_scale=0.5"]
    elif change == "the picture":
        photo(file, 1)
        os.utime(file, ns=(1, 1))
    elif change == "a missing file":
        (out / "a.npy").unlink()
    elif change == "tiles":
        options = Options(tiles=16)
    else:
        monkeypatch.setattr(
            "uvim_fsq.inference.predictor.recorded_hashes", lambda checkpoint: {"model.safetensors": "another"}
        )
    predicted.clear()
    predict_files(run, [str(file)], out, overrides, options)
    assert predicted and (out / "a.npy").exists()


@pytest.mark.slow
def test_settings_without_effect_predict_nothing_again(tmp_path: Path, run: Path, predicted: list[int]) -> None:
    file = str(photo(tmp_path / "a.png"))
    predict_files(run, [file], tmp_path / "out")
    predict_files(run, [file], tmp_path / "out", ["eval.batch_size=1"])
    assert predicted.count(1) == 1


@pytest.mark.slow
def test_a_killed_call_is_continued(
    tmp_path: Path, run: Path, predicted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    files, out = [str(photo(tmp_path / "in" / f"{i}.png", i)) for i in range(3)], tmp_path / "out"
    with monkeypatch.context() as patch:
        # As after SIGKILL: no index is written, and the last picture's files are not all in place.
        patch.setattr(PredictionFolder, "write_index", lambda self, entries: None)
        predict_files(run, files, out)
    (out / "2.npy").unlink()
    assert not (out / "predictions.json").exists()
    predicted.clear()
    predict_files(run, files, out)
    assert sum(predicted) == 1 and [entry["image"] for entry in index(out)] == files
    assert not (out / JOURNAL).exists()


def test_the_journal_is_not_written_through_a_link(tmp_path: Path, run: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "mine.txt").write_text("")
    (out / JOURNAL).symlink_to(tmp_path / "mine.txt")
    (entry,) = predict_files(run, [str(photo(tmp_path / "a.png"))], out)
    assert "error" in entry and (tmp_path / "mine.txt").read_text() == ""


@pytest.mark.slow
def test_a_large_picture_is_predicted_by_tiles(tmp_path: Path, run: Path, predicted: list[int]) -> None:
    file = photo(tmp_path / "a.png", size=(40, 50))
    main(["predict", str(run), str(file), "--tiles", "auto", "--overlap", "0", "--out", str(tmp_path / "out")])
    (entry,) = index(tmp_path / "out")
    assert sum(n for n in predicted) == 1 + 3 * 4 and entry["tiles"] == "16 pixels, overlap 0"
    found = np.load(entry["npy"])
    predictor = Predictor.from_run(run)
    assert found.shape == (40, 50) and np.isfinite(found).all()
    assert not np.array_equal(found, predictor.predict(file))


def test_a_picture_of_many_tiles_shows_how_many_are_predicted(
    tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[tuple[str, int, int | None]] = []

    def update(self: Bar, done: int, total: int | None = None) -> None:
        shown.append((self.title, done, total))

    monkeypatch.setattr(Bar, "update", update)
    predict_files(run, [str(photo(tmp_path / "a.png", size=(40, 50)))], tmp_path / "out", options=Options(16, 0.0))
    *tiles, _ = shown
    assert {title for title, *_ in tiles} == {"predicting a.png by tiles"}
    assert [done for _, done, _ in tiles] == [4, 8, 12, 13] and {total for *_, total in tiles} == {13}


def test_a_picture_that_fits_into_one_tile_is_predicted_as_a_whole(run: Path) -> None:
    from uvim_fsq.data.tiles import Tiling

    image, predictor = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8), Predictor.from_run(run)
    assert np.array_equal(predictor.predict_tiles(image, Tiling(32)), predictor.predict(image))


@pytest.mark.slow
def test_a_film_becomes_a_film_in_the_order_of_its_frames(
    tmp_path: Path, run: Path, predicted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = film(tmp_path / "clip.mp4", 7, rate=12), tmp_path / "out"
    monkeypatch.setattr(NYUDepth, "film_frame", lambda self, image, prediction: image)
    (entry,) = predict_files(run, [str(source)], out, ["eval.batch_size=3"])
    assert Path(entry["film"]) == out / "clip.mp4" and predicted == [3, 3, 1]
    written = Film(out / "clip.mp4")
    found = list(written)
    assert written.rate == 12 and len(found) == 7
    for one, other in zip(found, gray_frames(7), strict=True):
        assert np.abs(one.astype(int) - other).mean() < 8
    predicted.clear()
    assert predict_files(run, [str(source)], out) == [entry] and not predicted
    predict_files(run, [str(source)], out, options=Options(rate=30))
    assert Film(out / "clip.mp4").rate == 30 and sum(predicted) == 7


@pytest.mark.slow
def test_a_film_becomes_files_and_continues_where_it_was_left(tmp_path: Path, run: Path, predicted: list[int]) -> None:
    source, out, options = film(tmp_path / "clip.mp4", 4), tmp_path / "out", Options(write="files")
    entries = predict_files(run, [str(source)], out, options=options)
    assert [Path(entry["npy"]).name for entry in entries] == [f"clip_{i:06d}.npy" for i in range(1, 5)]
    assert entries[2]["image"] == f"{source}#000003"
    predictor = Predictor.from_run(run)
    for entry, frame in zip(entries, Film(source), strict=True):
        assert np.array_equal(np.load(entry["npy"]), predictor.predict(frame))
    (out / "clip_000002.npy").unlink()
    predicted.clear()
    assert predict_files(run, [str(source)], out, options=options) == entries and sum(predicted) == 1


@pytest.mark.slow
def test_a_folder_of_pictures_becomes_a_film(tmp_path: Path, run: Path) -> None:
    from PIL import Image

    (tmp_path / "walk").mkdir()
    for number, frame in enumerate(gray_frames(5)):
        Image.fromarray(frame).save(tmp_path / "walk" / f"{number}.png")
    options, out = Options(write="film", rate=5), tmp_path / "walk" / "out"
    predict_files(run, [str(tmp_path / "walk" / "0.png")], out)  # whose results are no frames
    (entry,) = predict_files(run, [str(tmp_path / "walk")], out, options=options)
    read = Film(Path(entry["film"]))
    assert Path(entry["film"]).name == "walk.mp4" and read.rate == 5 and len(list(read)) == 5
    photo(tmp_path / "walk" / "9.png", size=(10, 10))
    with pytest.raises(UserError, match="must have one size"):
        predict_files(run, [str(tmp_path / "walk")], out, options=options)
    assert Path(entry["film"]).exists() and index(out)[1] == entry


@pytest.mark.slow
def test_a_film_is_never_replaced_by_its_own_result(
    tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = film(tmp_path / "clip.mp4", 2)
    before = source.read_bytes()
    assert "a picture to predict; choose another --out" in failure(capsys, "predict", run, source, "--out", tmp_path)
    assert source.read_bytes() == before


@pytest.mark.slow
def test_a_broken_film_does_not_stop_the_others(tmp_path: Path, run: Path) -> None:
    broken, good = tmp_path / "a.mp4", film(tmp_path / "b.mp4", 2)
    broken.write_bytes(good.read_bytes()[:200])
    first, second = predict_files(run, [str(broken), str(good)], tmp_path / "out")
    assert "a.mp4 cannot be read as a film" in first["error"] and "film" in second


@pytest.mark.slow
def test_pictures_are_listed_in_a_file_and_on_standard_input(
    tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [photo(tmp_path / name) for name in ("a.png", "b=c.png", "two\nlines.png")]
    (tmp_path / "list=1.txt").write_text(f"{files[0]}\n\n  {files[1]}\n")
    stdin = io.TextIOWrapper(io.BytesIO(os.fsencode(files[2]) + b"\0"))
    monkeypatch.setattr("sys.stdin", stdin)
    main(["predict", str(run), f"@{tmp_path}/list=1.txt", "-", "--out", str(tmp_path / "out")])
    assert [entry["image"] for entry in index(tmp_path / "out")] == [str(file) for file in files]
    assert "3 pictures predicted in 0:00:0" in (said := capsys.readouterr().out) and "pictures/s" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tiles", "8"], "tiles of 8 pixels are too small; give 16 or more"),
        (["--tiles", "0"], "--tiles 0: give a number of pixels above 0, or auto"),
        (["--tiles=-5"], "--tiles -5: give a number of pixels above 0"),
        (["--overlap", "0.5"], "--overlap is that of tiles; give --tiles too"),
        (["--fps", "5"], "frames per second are for films, and none is written"),
        (["--write", "files", "--fps", "5"], "frames per second are for films, and none is written"),
        (["--tiles", "64", "--overlap", "1"], "an overlap of 1 is not possible"),
        (["--fps", "0"], "0 frames per second are not possible"),
        (["--fps", "0.001"], "give a number from 0.01 to 1000"),
        (["--fps", "nan"], "nan frames per second are not possible"),
        (["@nowhere.txt"], "the list nowhere.txt cannot be read"),
        (["x" * 300 + ".png"], "File name too long"),
    ],
)
def test_impossible_options_are_one_line(
    tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    said = failure(capsys, "predict", run, photo(tmp_path / "a.png"), *arguments, "--out", tmp_path / "out")
    assert message in said and not (tmp_path / "out").exists()
