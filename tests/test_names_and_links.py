"""Names in other people's lists, and links in their folders, lead nowhere: nothing outside is written or deleted."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.support.small import lm_run, small_data
from uvim_fsq import files
from uvim_fsq.cli import main
from uvim_fsq.data import cache
from uvim_fsq.data.cache import cached_arrays
from uvim_fsq.data.names import inner_name
from uvim_fsq.errors import UserError
from uvim_fsq.evaluation.run import write_csv
from uvim_fsq.files import inside, refuse_links
from uvim_fsq.tasks.coco_panoptic import index as coco_index
from uvim_fsq.tasks.coco_panoptic.config import CocoPanopticConfig
from uvim_fsq.tasks.coco_panoptic.data import open_source, prepare
from uvim_fsq.tasks.coco_panoptic.official import ResultWriter
from uvim_fsq.tasks.coco_panoptic.segments import Segments
from uvim_fsq.tasks.nyu_depth.config import NYUDepthConfig
from uvim_fsq.tasks.nyu_depth.data import open_source as open_depth
from uvim_fsq.training.run import train

OUT = ["/etc/passwd", "../x.png", "a/../../x.png", "..", "a\\..\\x.png", "C:x.png", "c:/x.png", "", "a\0b"]


@pytest.mark.parametrize("name", OUT)
def test_names_that_lead_out_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="which lies outside of the data set"):
        inner_name(name, tmp_path)


def test_names_that_stay_inside(tmp_path: Path) -> None:
    for name in ("a.png", "frankfurt/a_000.png", "..a.png", "a..b/c...png", "at 10:30.png", "ü/=1.png", 17):
        assert inner_name(name, tmp_path) == str(name)


@pytest.mark.parametrize("part", ["images", "annotations"])
@pytest.mark.parametrize("cached", [False, True])
def test_a_coco_file_names_nothing_outside(
    coco_scenes: Path, tmp_path: Path, part: str, cached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UVIM_FSQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(coco_index, "CACHE_FROM", 0 if cached else 1 << 40)
    root = tmp_path / "coco"
    shutil.copytree(coco_scenes, root)
    file = root / "annotations/panoptic_val2017.json"
    tree = json.loads(file.read_text())
    for name in ("../../escaped.png", str(tmp_path / "escaped.png")):
        tree[part][1]["file_name"] = name
        file.write_text(json.dumps(tree))
        for work in (
            lambda: open_source(str(root), "val", CocoPanopticConfig()),
            lambda: prepare(str(root), lambda done, total: None),
        ):
            with pytest.raises(UserError, match="escaped.png.*lies outside of the data set"):
                work()
    assert not list(tmp_path.rglob("escaped.png"))


def test_prepared_labels_go_through_no_link(coco_scenes: Path, tmp_path: Path) -> None:
    root, other = tmp_path / "coco", tmp_path / "other"
    shutil.copytree(coco_scenes, root)
    other.mkdir()
    for split in ("train", "val"):
        pngs = root / f"annotations/panoptic_{split}2017"
        file = pngs.with_suffix(".json")
        tree = json.loads(file.read_text())
        (pngs / "city").mkdir()
        for annotation in tree["annotations"]:
            (pngs / annotation["file_name"]).rename(pngs / "city" / annotation["file_name"])
            annotation["file_name"] = f"city/{annotation['file_name']}"
        file.write_text(json.dumps(tree))
    folder = root / "prepared_panoptic/panoptic_train2017"
    folder.mkdir(parents=True)
    (folder / "city").symlink_to(other)
    with pytest.raises(UserError, match="city is a link that leads out of"):
        prepare(str(root), lambda done, total: None)
    assert not list(other.iterdir())
    # The whole folder may be elsewhere: that is the user's own doing.
    shutil.rmtree(root / "prepared_panoptic")
    (root / "prepared_panoptic").symlink_to(other)
    prepare(str(root), lambda done, total: None)
    assert len(list(other.rglob("*.png"))) == 16
    segments = Segments(np.zeros((2, 2), np.int32), np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, bool))
    writer = ResultWriter(tmp_path / "results", [1])
    writer.add(segments, 1, "city/a.png")
    assert (tmp_path / "results/panoptic/city/a.png").is_file()
    (writer.pngs / "away").symlink_to(other)
    with pytest.raises(UserError, match="away is a link that leads out of"):
        writer.add(segments, 1, "away/a.png")


def test_depth_lists_name_nothing_outside(tmp_path: Path) -> None:
    root = small_data(tmp_path / "png", num=4, num_val=2, layout="png")
    lists = root / "nyudepthv2_test_files_with_gt.txt"
    rgb, depth, focal = lists.read_text().splitlines()[0].split()
    assert len(open_depth(str(root), "val", NYUDepthConfig())) == 2
    for line in (f"../{rgb} {depth} {focal}", f"{rgb} x/../../{depth} {focal}", f"/{rgb} C:\\{depth} {focal}"):
        lists.write_text(line + "\n")
        with pytest.raises(UserError, match="test_files_with_gt.txt lists the file .* lies outside of the data set"):
            open_depth(str(root), "val", NYUDepthConfig())
    lists.write_text(f"/{rgb} //{depth} {focal}\n")  # leading slashes are how these lists are published
    assert len(open_depth(str(root), "val", NYUDepthConfig())) == 1
    lists.write_bytes(f"{rgb} {depth} {focal}\nscene\xe9.jpg {depth} {focal}\n".encode("latin-1"))
    assert len(open_depth(str(root), "val", NYUDepthConfig())) == 2


# ---------------------------------------------------------------- tables


def test_tables_run_no_formulas(tmp_path: Path) -> None:
    names = ["=HYPERLINK(1)", "+1", "-1", "@SUM(1)", "\tx", "\rx", "a=1", "", "a,b\nc"]
    rows = {"lm": [{"id": name, "rmse": -1.5, "n": 3} for name in names], "=cmd": [{"id": "a", "pq": 0.25}]}
    write_csv(tmp_path / "a.csv", rows)
    with (tmp_path / "a.csv").open(newline="") as file:
        read = list(csv.DictReader(file))
    assert [row["id"] for row in read] == [*(f"'{name}" for name in names[:6]), *names[6:], "a"]
    assert read[0] == {"way": "lm", "id": "'=HYPERLINK(1)", "rmse": "-1.5", "n": "3", "pq": ""}
    assert read[-1] == {"way": "'=cmd", "id": "a", "rmse": "", "n": "", "pq": "0.25"}


# ---------------------------------------------------------------- links


def test_writing_replaces_a_link(tmp_path: Path) -> None:
    precious, file = tmp_path / "precious", tmp_path / "run" / "a.json"
    precious.write_text("mine")
    file.parent.mkdir()
    file.symlink_to(precious)
    (file.parent / f".a.json.{os.getpid()}.partial").symlink_to(precious)
    files.write_json(file, {"a": 1})
    assert precious.read_text() == "mine" and json.loads(file.read_text()) == {"a": 1} and not file.is_symlink()
    # A device behind a link is not written, what /dev itself links to is.
    file.unlink()
    file.symlink_to("/dev/full")
    files.write_text(file, "x")
    assert file.read_text() == "x" and not file.is_symlink()
    end, start = os.pipe()
    files.write_text(Path(f"/dev/fd/{start}"), "through the pipe")
    assert os.read(end, 99) == b"through the pipe"


def test_what_is_inside(tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "run_2"
    (run / "a").mkdir(parents=True)
    other.mkdir()
    (run / "inner").symlink_to(run / "a")
    (tmp_path / "alias").symlink_to(run)
    for file in (run / "x", run / "a/x", run / "inner/x", run / "new/x"):
        assert inside(run, file) == file
    assert inside(tmp_path / "alias", run / "x")
    refuse_links(run)
    refuse_links(tmp_path / "nowhere")
    (run / "a" / "out").symlink_to(other)
    with pytest.raises(UserError, match="a/out is a link that leads out of .*run, to .*run_2; replace it"):
        refuse_links(run)
    with pytest.raises(UserError, match="leads out of"):
        inside(run, run / "a/out/x")
    (run / "a" / "out").unlink()
    (run / "dead").symlink_to(tmp_path / "not" / "there")
    with pytest.raises(UserError, match="dead is a link"):
        refuse_links(run)


@pytest.mark.parametrize("link", ["checkpoints", "panels", "tensorboard", "checkpoints/.tmp_step_00000009", "oracle"])
def test_training_writes_and_deletes_nothing_behind_a_link(
    lm_dir: Path, oracle_dir: Path, tmp_path: Path, link: str
) -> None:
    run, mine = tmp_path / "run", tmp_path / "mine"
    shutil.copytree(lm_dir, run)
    mine.mkdir()
    if (run / link).exists():
        shutil.copytree(run / link, mine, dirs_exist_ok=True)
        shutil.rmtree(run / link)
    (run / link).symlink_to(mine)
    before = sorted(mine.rglob("*"))
    with pytest.raises(UserError, match=f"{link} is a link that leads out of"):
        train(lm_run(run, oracle_dir, "train.resume=auto", "train.steps=9", "train.save_every=1", "train.keep=1"))
    assert sorted(mine.rglob("*")) == before


def test_what_evaluation_leaves_replaces_links(lm_dir: Path, tmp_path: Path) -> None:
    run, precious = tmp_path / "run", tmp_path / "precious"
    shutil.copytree(lm_dir, run)
    precious.write_text("mine")
    names = ["evaluation.json", "rows.csv", "page.html", "metrics.jsonl"]
    names += ["analysis/analysis.json", "analysis/report.html", "analysis/stitched.png"]
    (run / "analysis").mkdir()
    main(["analyze", str(run), "--limit", "2"])
    names += [f"analysis/{file.name}" for file in (run / "analysis").glob("*.png")]
    for name in names:
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(precious)
    main(["evaluate", str(run), "--limit", "2", "--csv", str(run / "rows.csv"), "--report", str(run / "page.html")])
    main(["evaluate", str(run), "--json", str(run / "evaluation.json")])
    main(["analyze", str(run), "--limit", "2"])
    assert precious.read_text() == "mine"


@pytest.mark.parametrize("place", ["official", "official/oracle", "analysis"])
def test_default_folders_in_a_run_are_no_links(
    place: str, lm_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, mine = tmp_path / "run", tmp_path / "mine"
    shutil.copytree(lm_dir, run)
    mine.mkdir()
    (run / place).parent.mkdir(exist_ok=True)
    (run / place).symlink_to(mine)
    command = ["analyze", str(run)] if place == "analysis" else ["evaluate", str(run), "--official"]
    with pytest.raises(SystemExit):
        main(command)
    assert "is a link that leads out of" in capsys.readouterr().err and not list(mine.iterdir())


# ---------------------------------------------------------------- the cache


def test_the_cache_is_the_users_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cache"
    monkeypatch.setenv("UVIM_FSQ_CACHE", str(folder))
    made: list[int] = []

    def make() -> dict[str, np.ndarray]:
        made.append(1)
        return {"a": np.array([len(made)])}

    def read() -> int:
        return int(cached_arrays("kind", {}, make)["a"][0])

    assert [read(), read()] == [1, 1] and folder.stat().st_mode & 0o777 == 0o700
    (file,) = folder.iterdir()
    assert file.stat().st_mode & 0o077 == 0
    user = cache._user()
    monkeypatch.setattr(cache, "_user", lambda: user + 1)  # everything there is another's now
    with pytest.warns(UserWarning, match="belongs to another user"):
        assert [read(), read()] == [2, 3]
    assert list(folder.iterdir()) == [file]


def test_files_and_links_of_others_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def foreign(path: Path) -> Callable[..., os.stat_result]:
        """Path.lstat and Path.stat, where `path` belongs to somebody else."""
        real = Path.stat

        def stat(self: Path, *, follow_symlinks: bool = True) -> os.stat_result:
            found = real(self, follow_symlinks=follow_symlinks)
            if self != path:
                return found
            values = list(found)
            values[4] += 1
            return os.stat_result(values)

        return stat

    folder = tmp_path / "cache"
    monkeypatch.setenv("UVIM_FSQ_CACHE", str(folder))
    cached_arrays("kind", {}, lambda: {"a": np.array([1])})
    (file,) = folder.iterdir()
    monkeypatch.setattr(Path, "stat", foreign(file))
    assert cached_arrays("kind", {}, lambda: {"a": np.array([2])})["a"][0] == 2
    monkeypatch.undo()
    monkeypatch.setenv("HOME", "~")
    monkeypatch.delenv("UVIM_FSQ_CACHE", raising=False)
    assert cache.cache_dir().name == f"uvim_fsq_{cache._user()}"
