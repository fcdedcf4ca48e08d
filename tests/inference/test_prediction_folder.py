"""`uvim-fsq predict` replaces nothing but its own results and lists every image."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.photos import noise_photo as photo
from tests.support.small import TASKS
from uvim_fsq.cli import main
from uvim_fsq.inference.predict_files import predict_files
from uvim_fsq.inference.prediction_folder import JOURNAL, NO_FILES, PredictionFolder
from uvim_fsq.inference.predictor import Predictor


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def index(out: Path) -> list[dict[str, str]]:
    return json.loads((out / "predictions.json").read_text())


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> list[str]:
    """Runs `predict`, which must end with exit code 2; returns the lines of standard error."""
    with pytest.raises(SystemExit) as caught:
        main(["predict", *map(str, arguments)])
    assert caught.value.code == 2
    return capsys.readouterr().err.splitlines()


def test_an_input_image_is_never_replaced(tmp_path: Path, lm_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = tmp_path / "own"
    photo(own / "another.jpg")
    photo(own / "pic.png")
    before = content(own)
    assert refused(capsys, lm_dir, own, "--out", own) == [
        f"error: a result would replace {own / 'pic.png'}, a picture to predict; choose another --out"
    ]
    assert content(own) == before
    elsewhere = photo(tmp_path / "elsewhere" / "pic.jpg")
    (own / "pic.png").unlink()
    for link in (os.symlink, os.link):
        link(elsewhere, own / "pic.png")
        assert "a picture to predict" in refused(capsys, lm_dir, elsewhere, "--out", own)[0]
        (own / "pic.png").unlink()


@pytest.mark.slow
def test_only_results_are_replaced(tmp_path: Path, lm_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two, out = photo(tmp_path / "one.jpg"), photo(tmp_path / "two.jpg", 1), tmp_path / "out"
    out.mkdir()
    (out / "one.npy").write_text("the user's")
    (line,) = refused(capsys, lm_dir, one, "--out", out)
    assert "one.npy already exists and is not a result of an earlier predict" in line
    assert content(out) == {"one.npy": b"the user's"}
    (out / "one.npy").unlink()
    for pictures in ([one], [two], [one, two]):
        main(["predict", str(lm_dir), *map(str, pictures), "--out", str(out)])
    assert [entry["image"] for entry in index(out)] == [str(one), str(two)]
    assert len(content(out)) == 7
    (out / "predictions.json").write_text('[{"image"')
    assert "predictions.json is damaged" in refused(capsys, lm_dir, one, "--out", out)[0]


def test_results_inside_the_input_folder_are_not_inputs(tmp_path: Path, lm_dir: Path) -> None:
    photo(tmp_path / "photos" / "pic.png")
    out = tmp_path / "photos" / "results"
    for _ in range(2):
        assert len(predict_files(lm_dir, [str(tmp_path / "photos")], out)) == 1
    assert set(content(out)) == {"pic.png", "pic.npy", "pic_color.png", "predictions.json"}
    named = predict_files(lm_dir, [str(out / "pic_color.png"), str(out / "pic_color.png")], tmp_path / "again")
    assert [entry["image"] for entry in named] == [str(out / "pic_color.png")]


def test_no_two_images_share_a_result_file(tmp_path: Path, lm_dir: Path) -> None:
    names = ["pic.png", "pic_color.png", "a/pic.jpg", "b/pic.jpg", "b/c/pic.jpg", "x/b/pic.jpg", "PIC.png", "Ö.png"]
    names.append("d/O\u0308.png")  # the same name in another Unicode normalization, one file on some systems
    photos = {str(photo(tmp_path / "in" / name, seed)) for seed, name in enumerate(names)}
    written = predict_files(lm_dir, [str(tmp_path / "in")], tmp_path / "out")
    assert {entry["image"] for entry in written} == photos
    files = [path for entry in written for kind, path in entry.items() if kind not in NO_FILES]
    assert len({Path(path).name.casefold() for path in files}) == len(files) == 3 * len(names)
    assert {Path(path).name for path in files} | {"predictions.json"} == set(content(tmp_path / "out"))
    predictor = Predictor.from_run(lm_dir)
    for entry in written:
        assert np.array_equal(np.load(entry["npy"]), predictor.predict(entry["image"]))


def test_the_index_names_checkpoint_and_overrides(tmp_path: Path, lm_dir: Path) -> None:
    file = str(photo(tmp_path / "in" / "a.png"))
    for overrides, named in (([], None), (["eval.temperature=0.5"], "eval.temperature=0.5"), ([], None)):
        (entry,) = predict_files(lm_dir, [file], tmp_path / "out", overrides)
        assert index(tmp_path / "out") == [entry]
        assert entry.get("overrides") == named and Path(entry["checkpoint"]).parent.parent == lm_dir


def test_an_image_named_like_the_index_gets_another_name(tmp_path: Path) -> None:
    file = photo(tmp_path / "in" / "predictions.jpg")
    folder = PredictionFolder(tmp_path / "out", TASKS["panoptic"], [file], named=[file])
    assert folder.stems == {file: "in_predictions"}


def test_every_failed_image_is_named(tmp_path: Path, lm_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    good = [str(photo(folder / f"{i}.png", i)) for i in range(3)]
    broken = []
    for i in range(23):
        file = folder / f"bad{i:02d}.png"
        file.write_bytes(Path(good[0]).read_bytes()[:100])
        broken.append(str(file))
    said = refused(capsys, lm_dir, folder, "--out", out)
    assert len(said) == 21 and all(f"failed: {file}" in line for file, line in zip(broken[:20], said, strict=False))
    assert said[-1] == "error: 23 of 26 images could not be predicted, 3 of them not shown; the index lists all"
    listed = index(out)
    assert [entry["image"] for entry in listed] == [*good, *broken]
    assert all("cannot be read as an image" in entry["error"] for entry in listed[3:])
    assert all(np.load(entry["npy"]).shape == (20, 30) for entry in listed[:3])


def test_a_dead_link_is_a_failed_image(tmp_path: Path, lm_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo(tmp_path / "in" / "a.jpg")
    (tmp_path / "in" / "dead.jpg").symlink_to("nowhere.jpg")
    (tmp_path / "in" / "folder.jpg").mkdir()
    first, second, last = refused(capsys, lm_dir, tmp_path / "in", "--out", tmp_path / "out")
    assert first == f"failed: {tmp_path / 'in' / 'dead.jpg'}: no such image file" and "folder.jpg cannot be" in second
    assert last == "error: 2 of 3 images could not be predicted; the index lists all"


def test_a_full_disk_leaves_whole_results_and_their_list(
    tmp_path: Path, lm_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    for i in range(4):
        photo(folder / f"{i}.png", i)
    save = np.save

    def full(file: Any, array: np.ndarray) -> None:
        if "2.npy" in file.name:
            file.write(b"half")
            raise OSError("1000 requested and 512 written")
        save(file, array)

    monkeypatch.setattr(np, "save", full)
    (line,) = refused(capsys, lm_dir, folder, "--out", out)
    assert "the disk is full" in line and str(out / "2.npy") in line
    assert set(content(out)) == {f"{i}{end}" for i in (0, 1) for end in (".png", ".npy", "_color.png")} | {
        "predictions.json"
    }
    assert [Path(entry["image"]).name for entry in index(out)] == ["0.png", "1.png"]


def test_undeclared_result_files_replace_nothing(tmp_path: Path, lm_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = Predictor.from_run(lm_dir)
    one, two, out = photo(tmp_path / "one.jpg"), photo(tmp_path / "two.jpg"), tmp_path / "out"
    out.mkdir()
    (out / "one_notes.txt").write_text("the user's")

    def talkative(prediction: Any, image: np.ndarray, stem: str) -> dict[str, str]:
        Path(f"{stem}_notes.txt").write_text("the task's")
        return {"notes": f"{stem}_notes.txt"}

    monkeypatch.setattr(predictor.task, "save_prediction", talkative)
    monkeypatch.setattr(Predictor, "from_run", lambda *_: predictor)
    first, second = predict_files(lm_dir, [str(one), str(two)], out)
    assert "one_notes.txt already exists" in first["error"] and second["notes"] == str(out / "two_notes.txt")
    assert content(out).keys() == {"one_notes.txt", "two_notes.txt", "predictions.json"}
    assert (out / "one_notes.txt").read_text() == "the user's"


def test_an_output_folder_that_cannot_be_written_is_one_line(
    tmp_path: Path, lm_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = photo(tmp_path / "a.png")
    for out in (picture, picture / "out", Path("/proc/out")):
        (line,) = refused(capsys, lm_dir, picture, "--out", out)
        assert line.startswith("error: cannot write")


def predict_none(out: Path, *files: Path, settings: str = "s", resume: bool = True) -> PredictionFolder:
    """A call of `predict` that needs no model."""
    folder = PredictionFolder(out, TASKS["depth"], files, named=files, provenance={"settings": settings}, resume=resume)
    image = np.zeros((4, 5, 3), np.uint8)
    made = {file: folder.save(file, np.ones((4, 5), np.float32), image) for file in folder.files}
    folder.write_index([(folder.done | made)[file] for file in folder.images])
    return folder


def test_results_of_another_picture_of_the_same_name_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, out = photo(tmp_path / "x" / "a.png"), photo(tmp_path / "y" / "a.png"), tmp_path / "out"
    predict_none(out, x)
    assert predict_none(out, y).stems == {y: "y_a"}
    assert not predict_none(out, x, y).files and len(index(out)) == 2
    # Its own results are replaced, by whatever path it is named.
    assert predict_none(out, y, settings="t").stems == {y: "y_a"}
    monkeypatch.chdir(tmp_path)
    assert predict_none(out, Path("x/a.png")).stems == {Path("x/a.png"): "a"}
    assert len(index(out)) == 2 and len(content(out)) == 7


def test_a_picture_that_is_gone_is_not_done(tmp_path: Path) -> None:
    picture, link = photo(tmp_path / "a.png"), tmp_path / "link.png"
    link.symlink_to(picture)
    predict_none(tmp_path / "out", link)
    picture.unlink()
    folder = PredictionFolder(
        tmp_path / "out", TASKS["depth"], [link], [link], provenance={"settings": "s"}, resume=True
    )
    assert folder.files == [link] and not folder.done


def test_what_a_killed_call_left_is_no_picture_and_is_removed(tmp_path: Path) -> None:
    out = tmp_path / "photos" / "out"
    picture, left = photo(tmp_path / "photos" / "a.png"), photo(out / ".predict-ab_c12z9" / "a.png")
    mine = photo(out / ".predict-mine" / "b.png")
    folder = PredictionFolder(out, TASKS["depth"], [picture, left, mine], [tmp_path / "photos"])
    assert folder.images == [picture, mine]
    assert not left.parent.exists() and mine.exists()


@pytest.mark.parametrize("letter", ["a", "道"])
def test_results_of_long_names_have_shorter_ones(tmp_path: Path, letter: str) -> None:
    length = 250 // len(letter.encode())
    files = [photo(tmp_path / folder / f"{letter * length}.png") for folder in ("x", "y")]
    (tmp_path / "out").mkdir()
    predict_none(tmp_path / "out", *files)
    assert len(content(tmp_path / "out")) == 7
    assert not predict_none(tmp_path / "out", *files).files


def test_a_line_of_the_journal_that_was_cut_off_spoils_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture, out = photo(tmp_path / "a.png"), tmp_path / "out"
    out.mkdir()
    (out / JOURNAL).write_text('{"image": "b.p')
    with monkeypatch.context() as patch:
        patch.setattr(PredictionFolder, "write_index", lambda self, entries: None)
        predict_none(out, picture)
    with pytest.warns(UserWarning, match="skipped 1 damaged line"):
        assert not predict_none(out, picture).files
